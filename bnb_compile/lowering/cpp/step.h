// One optimizer step for a bucket of parameters: a single parallel loop over all their blocks.
//
// Printed before this text: struct Rule with
//   STATES, HYPER, SCALARS, SIGNED[STATES]
//   STEP_SIZE, UNIT                   which scalars these are
//   scalars(hyper, step, out)         what the elements of a parameter share
//   update(param, grad, state, s)     the update of LANES elements; param and state are replaced
//   direction(param, grad, state, s)  returns the direction; state is replaced
// GRAD_LIMIT and the Modes of ops/step.py, trust_ratio(max_unorm, param_norm, update_norm) and
// round_bits(bits, index, step)

// A parameter of the bucket; Python fills an int64 row of the same fields.
struct Parameter {
  void* data;
  const void* grad;  // null: no gradient, nothing of this parameter is touched
  int64_t numel;
  int64_t offset;  // of its first element in the arenas
  int64_t block;   // of its first scale
  // Null for a contiguous tensor, otherwise {dims, sizes..., strides...}.
  const int64_t* data_strides;
  const int64_t* grad_strides;
};

inline float largest(const V& value) {
  return at::vec::vec_reduce_all<float>(
      [](const V& a, const V& b) { return at::vec::clamp_min(a, b); }, value);
}

// Whether all of a block's gradients are below the limit, and none is NaN.
template <class G>
inline bool all_usable(const G* grad, const V& scale) {
  if constexpr (SKIP_ZEROS) return false;  // each is looked at then
  const V to_infinity = (SCALED ? scale : V(1.f)) * V((float)(0x1p128 / GRAD_LIMIT));
  V bad(0.f);  // zero, or NaN from 0 * infinity
  for (int i = 0; i < BLOCK; i += LANES)
    bad = at::vec::fmadd(read(grad + i) * to_infinity, V(0.f), bad);
  return bad.zero_mask() == (1 << LANES) - 1;
}

// All bits of the lanes whose gradient is used.
inline V usable(const V& grad) {
  const V below = grad.abs() < V(GRAD_LIMIT);
  if constexpr (SKIP_ZEROS) return below & (grad != V(0.f));
  return below;
}

// Of a block, and then of a parameter: what its update must know beforehand.
struct Measured {
  double update = 0, param = 0;  // sums of squares
  float absmax[Rule::STATES + 1] = {};

  void add(const Measured& other) {
    update += other.update;
    param += other.param;
    for (int s = 0; s < Rule::STATES; s++) absmax[s] = std::max(absmax[s], other.absmax[s]);
  }
};

// Numbers of bfloat16; `index` is the first lane's.
inline V round_by_chance(const V& value, int32_t index, int32_t step) {
  alignas(64) int32_t bits[LANES];
  value.store(bits);
  round_bits(I::loadu(bits), I::arange(index, 1), I(step)).store(bits);
  return V::loadu(bits);
}

inline float sum(const V& value) {
  float lanes[LANES], total = 0;
  value.store(lanes);
  for (float lane : lanes) total += lane;
  return total;
}

// 8-bit states: codes and one scale for each block.
struct Blockwise {
  uint8_t* codes[Rule::STATES + 1];
  float* absmax[Rule::STATES + 1];

  template <int s>
  struct Buffer {
    Staged<uint8_t> staged;
    alignas(64) float fresh[BLOCK];
  };

  // A block of one state. Its buffer is elsewhere, so that the members can live in registers.
  template <int s>
  struct State {
    using C = Codec<Rule::SIGNED[s]>;
    const C codec{};
    uint8_t* const codes;
    float* const fresh;
    const V scale;
    V high{0.f};  // largest magnitudes

    State(const Blockwise& arena, Buffer<s>& buffer, int64_t first, int64_t block, int count)
        : codes(buffer.staged.in(arena.codes[s] + first, nullptr, 0, count, C::ZERO)),
          fresh(buffer.fresh),
          scale(arena.absmax[s][block]) {}
    inline V decode(int i) const {
      return codec.decode(codes + i) * scale;
    }
    inline void measure(const V& value) {
      high = at::vec::clamp_min(high, Rule::SIGNED[s] ? value.abs() : value);
    }
    inline float absmax() const {
      return largest(high);
    }
    inline void keep(int i, const V& value) {
      value.store(fresh + i);
      if constexpr (BLOCK_WISE) measure(value);
    }
    void out(
        const Blockwise& arena, Buffer<s>& buffer, int64_t first, int64_t block, int count,
        const Measured& whole) {
      float absmax = BLOCK_WISE ? this->absmax() : whole.absmax[s];
      if (absmax < std::numeric_limits<float>::min()) absmax = 0.f;  // as ops/blockwise.py
      absmax = std::min(absmax, std::numeric_limits<float>::max());
      arena.absmax[s][block] = absmax;
      C::encode(fresh, absmax > 0.f ? 1.f / absmax : 0.f, codes);
      buffer.staged.out(arena.codes[s] + first, nullptr, 0, count);
    }
  };
};

// 32-bit states.
struct Full {
  float* state[Rule::STATES + 1];

  template <int s>
  using Buffer = Staged<float>;

  template <int s>
  struct State {
    float* const values;

    State(const Full& arena, Buffer<s>& buffer, int64_t first, int64_t, int count)
        : values(buffer.in(arena.state[s] + first, nullptr, 0, count)) {}
    inline V decode(int i) const {
      return V::loadu(values + i);
    }
    inline void measure(const V&) {}
    inline float absmax() const {
      return 0.f;
    }
    inline void keep(int i, const V& value) {
      value.store(values + i);
    }
    void out(
        const Full& arena, Buffer<s>& buffer, int64_t first, int64_t, int count, const Measured&) {
      buffer.out(arena.state[s] + first, nullptr, 0, count);
    }
  };
};

// Updates block b of a parameter; or, if MEASURE, only finds out about it.
template <bool MEASURE, class P, class G, class Storage, int... S>
Measured update_block(
    const Parameter& parameter, const Storage& arena, int64_t b, const float* shared, float grad_scale,
    float step, const Measured& whole, std::integer_sequence<int, S...>) {
  const int64_t first = b * BLOCK, offset = parameter.offset + first, scale = parameter.block + b;
  const int count = (int)std::min<int64_t>(BLOCK, parameter.numel - first);
  Staged<P> staged_param;
  Staged<G> staged_grad;
  P* const data = (P*)parameter.data;
  P* const param = staged_param.in(data, parameter.data_strides, first, count);
  const G not_usable(std::numeric_limits<float>::quiet_NaN());  // past the end
  const G* const grad =
      staged_grad.in((G*)parameter.grad, parameter.grad_strides, first, count, not_usable);
  std::tuple<typename Storage::template Buffer<S>...> buffers;
  std::tuple<typename Storage::template State<S>...> states{
      typename Storage::template State<S>(arena, std::get<S>(buffers), offset, scale, count)...};

  V s[Rule::SCALARS];
  for (int k = 0; k < Rule::SCALARS; k++) s[k] = V(shared[k]);
  const V of_grad(grad_scale);
  V update_squares(0.f), param_squares(0.f);
  const auto update = [&](auto checked) {
    for (int i = 0; i < BLOCK; i += LANES) {
      const V old_param = read(param + i);
      const V old[] = {std::get<S>(states).decode(i)..., V(0.f)};
      V fresh[] = {old[S]..., V(0.f)};
      V fresh_param = old_param;
      const V grad_f32 = SCALED ? read(grad + i) * of_grad : read(grad + i);
      V direction;
      if constexpr (MEASURE && TRUST) {
        direction = Rule::direction(old_param, grad_f32, fresh, s);
      } else {
        Rule::update(fresh_param, grad_f32, fresh, s);
        if constexpr (STOCHASTIC)
          fresh_param = round_by_chance(fresh_param, (int32_t)(offset + i), (int32_t)step);
      }
      if constexpr (checked) {
        const V keep = usable(grad_f32);
        fresh_param = V::blendv(old_param, fresh_param, keep);
        direction = V::blendv(V(0.f), direction, keep);
        ((fresh[S] = V::blendv(old[S], fresh[S], keep)), ...);
      }
      if constexpr (MEASURE) {
        update_squares = at::vec::fmadd(direction, direction, update_squares);
        param_squares = at::vec::fmadd(old_param, old_param, param_squares);
        (std::get<S>(states).measure(fresh[S]), ...);
      } else {
        write(fresh_param, param + i);
        (std::get<S>(states).keep(i, fresh[S]), ...);
      }
    }
  };
  if constexpr (SKIP_ZEROS && BLOCK_WISE && !MEASURE) {
    // Encoding a block anew may change it, so one without any gradient is left alone.
    V any(0.f);
    for (int i = 0; i < BLOCK; i += LANES)
      any = V::blendv(any, V(1.f), usable(SCALED ? read(grad + i) * of_grad : read(grad + i)));
    if (largest(any) == 0.f) return Measured();
  }
  // Elements with an unusable gradient stay as they are; most blocks have none and need no check of each.
  if (all_usable(grad, of_grad)) {
    update(std::false_type());
  } else {
    update(std::true_type());
  }
  Measured found;
  if constexpr (MEASURE) {
    found.update = TRUST ? sum(update_squares) : 0.f;
    found.param = sum(param_squares);
    ((found.absmax[S] = std::get<S>(states).absmax()), ...);
  } else {
    staged_param.out(data, parameter.data_strides, first, count);
    (std::get<S>(states).out(arena, std::get<S>(buffers), offset, scale, count, whole), ...);
  }
  return found;
}

template <class P, class G, class Storage>
void update_bucket(
    const Parameter* parameters, int64_t count, const Storage& arena, float* step,
    const double* hyper, const float* grad_scale, const float* max_unorm) {
  constexpr auto STATES = std::make_integer_sequence<int, Rule::STATES>();
  const auto scale = [&](int64_t k) { return SCALED ? grad_scale[k] : 1.f; };
  const auto active = [&](int64_t k) { return parameters[k].grad && std::isfinite(scale(k)); };
  const auto blocks = [&](int64_t k) {
    return active(k) ? (parameters[k].numel + BLOCK - 1) / BLOCK : 0;
  };
  for (int64_t k = 0; k < count; k++)
    if (active(k)) step[k] += 1.f;

  std::vector<Measured> whole(TWO_PHASES ? count : 1);
  if constexpr (TWO_PHASES) {
    int64_t total = 0;
    for (int64_t k = 0; k < count; k++) total += blocks(k);
    std::vector<Measured> found(total);
    share_out(count, 64, blocks, [&](int64_t k, int64_t from, int64_t to, int64_t passed) {
      float shared[Rule::SCALARS];
      Rule::scalars(hyper + k * Rule::HYPER, step[k], shared);
      for (int64_t b = from; b < to; b++)
        found[passed + b] =
            update_block<true, P, G>(parameters[k], arena, b, shared, scale(k), step[k], whole[k], STATES);
    });
    const Measured* next = found.data();
    for (int64_t k = 0; k < count; k++)
      for (int64_t b = 0; b < blocks(k); b++) whole[k].add(*next++);
  }

  // A thread is worth waking for some 10 microseconds of work.
  share_out(count, 64, blocks, [&](int64_t k, int64_t from, int64_t to, int64_t) {
    float shared[Rule::SCALARS];
    Rule::scalars(hyper + k * Rule::HYPER, step[k], shared);
    const Measured& all = whole[TWO_PHASES ? k : 0];
    if constexpr (TRUST) {
      const double unit = shared[Rule::UNIT];
      shared[Rule::STEP_SIZE] *=
          trust_ratio(max_unorm[k], std::sqrt(all.param), unit * std::sqrt(all.update));
    }
    for (int64_t b = from; b < to; b++)
      update_block<false, P, G>(parameters[k], arena, b, shared, scale(k), step[k], all, STATES);
  });
}
