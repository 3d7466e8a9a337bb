// One optimizer step for a bucket of parameters: a single parallel loop over all their blocks.
//
// Printed before this text: struct Rule with
//   STATES, HYPER, SCALARS, SIGNED[STATES]
//   scalars(hyper, step, out)      what the elements of a parameter share
//   update(param, grad, state, s)  the update of LANES elements; param and state are replaced
// and GRAD_LIMIT of ops/step.py

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
inline bool usable(const G* grad) {
  const V to_infinity((float)(0x1p128 / GRAD_LIMIT));
  V bad(0.f);  // zero, or NaN from 0 * infinity
  for (int i = 0; i < BLOCK; i += LANES)
    bad = at::vec::fmadd(read(grad + i) * to_infinity, V(0.f), bad);
  return bad.zero_mask() == (1 << LANES) - 1;
}

// 8-bit states: codes and one scale for each block.
struct Blockwise {
  uint8_t* codes[Rule::STATES];
  float* absmax[Rule::STATES];

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
    V high{0.f};

    State(const Blockwise& arena, Buffer<s>& buffer, int64_t first, int64_t block, int count)
        : codes(buffer.staged.in(arena.codes[s] + first, nullptr, 0, count, C::ZERO)),
          fresh(buffer.fresh),
          scale(arena.absmax[s][block]) {}
    inline V decode(int i) const {
      return codec.decode(codes + i) * scale;
    }
    inline void keep(int i, const V& value) {
      value.store(fresh + i);
      high = at::vec::clamp_min(high, Rule::SIGNED[s] ? value.abs() : value);
    }
    void out(const Blockwise& arena, Buffer<s>& buffer, int64_t first, int64_t block, int count) {
      float absmax = largest(high);
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
  float* state[Rule::STATES];

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
    inline void keep(int i, const V& value) {
      value.store(values + i);
    }
    void out(const Full& arena, Buffer<s>& buffer, int64_t first, int64_t, int count) {
      buffer.out(arena.state[s] + first, nullptr, 0, count);
    }
  };
};

template <class P, class G, class Storage, int... S>
void update_block(
    const Parameter& parameter, const Storage& arena, int64_t b, const float* shared,
    std::integer_sequence<int, S...>) {
  const int64_t first = b * BLOCK, offset = parameter.offset + first, scale = parameter.block + b;
  const int count = (int)std::min<int64_t>(BLOCK, parameter.numel - first);
  Staged<P> staged_param;
  Staged<G> staged_grad;
  P* const data = (P*)parameter.data;
  P* const param = staged_param.in(data, parameter.data_strides, first, count);
  const G* const grad =
      staged_grad.in((G*)parameter.grad, parameter.grad_strides, first, count);
  std::tuple<typename Storage::template Buffer<S>...> buffers;
  std::tuple<typename Storage::template State<S>...> states{
      typename Storage::template State<S>(arena, std::get<S>(buffers), offset, scale, count)...};

  V s[Rule::SCALARS];
  for (int k = 0; k < Rule::SCALARS; k++) s[k] = V(shared[k]);
  const auto update = [&](auto checked) {
    for (int i = 0; i < BLOCK; i += LANES) {
      const V old_param = read(param + i);
      const V old[] = {std::get<S>(states).decode(i)...};
      V fresh[] = {old[S]...};
      V fresh_param = old_param;
      const V grad_f32 = read(grad + i);
      Rule::update(fresh_param, grad_f32, fresh, s);
      if constexpr (checked) {
        const V keep = grad_f32.abs() < V(GRAD_LIMIT);
        fresh_param = V::blendv(old_param, fresh_param, keep);
        ((fresh[S] = V::blendv(old[S], fresh[S], keep)), ...);
      }
      write(fresh_param, param + i);
      (std::get<S>(states).keep(i, fresh[S]), ...);
    }
  };
  // Elements with an unusable gradient stay as they are; most blocks have none and need no check of each.
  if (usable(grad)) {
    update(std::false_type());
  } else {
    update(std::true_type());
  }
  staged_param.out(data, parameter.data_strides, first, count);
  (std::get<S>(states).out(arena, std::get<S>(buffers), offset, scale, count), ...);
}

template <class P, class G, class Storage>
void update_bucket(
    const Parameter* parameters, int64_t count, const Storage& arena, float* step,
    const double* hyper) {
  const auto blocks = [&](int64_t k) {
    return parameters[k].grad ? (parameters[k].numel + BLOCK - 1) / BLOCK : 0;
  };
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) {
    total += blocks(k);
    if (parameters[k].grad) step[k] += 1.f;
  }
  // A thread is worth waking for some 10 microseconds of work.
  const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), total / 64));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
    const int64_t begin = total * member / team, end = total * (member + 1) / team;
    int64_t passed = 0;
    for (int64_t k = 0; k < count && passed < end; k++) {
      const int64_t from = std::max(begin, passed) - passed;
      const int64_t to = std::min(end - passed, blocks(k));
      if (from < to) {
        float shared[Rule::SCALARS];
        Rule::scalars(hyper + k * Rule::HYPER, step[k], shared);
        for (int64_t b = from; b < to; b++)
          update_block<P, G>(
              parameters[k], arena, b, shared, std::make_integer_sequence<int, Rule::STATES>());
      }
      passed += blocks(k);
    }
  }
}
