// One optimizer step for a bucket of parameters: a single parallel loop over all their blocks.
//
// Printed before this text: struct Rule with
//   STATES, HYPER, SCALARS, SIGNED[STATES]
//   scalars(hyper, step, out)      what the elements of a parameter share
//   update(param, grad, state, s)  the update of LANES elements; param and state are replaced

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

template <class T>
inline V load(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return V::loadu(from);
  } else {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, LANES));
  }
}

template <class T>
inline void store(const V& value, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    value.store(to);
  } else {
    at::vec::convert<T>(value).store(to, LANES);
  }
}

inline float largest(const V& value) {
  return at::vec::vec_reduce_all<float>(
      [](const V& a, const V& b) { return at::vec::clamp_min(a, b); }, value);
}

// Whether all of a block's gradients are below 2^60, and none is NaN.
template <class G>
inline bool moderate(const G* grad) {
  V bad(0.f);  // zero, or NaN from 0 * infinity
  for (int i = 0; i < BLOCK; i += LANES)
    bad = at::vec::fmadd(load(grad + i) * V(0x1p68f), V(0.f), bad);
  return bad.zero_mask() == (1 << LANES) - 1;
}

// Calls visit(element, place in memory) for `count` elements in logical order from `first` on.
template <class Visit>
inline void walk(const int64_t* strides, int64_t first, int count, const Visit& visit) {
  const int dims = (int)strides[0];
  const int64_t *size = strides + 1, *stride = strides + 1 + dims;
  for (int i = 0; i < count; i++) {
    int64_t rest = first + i, place = 0;
    for (int d = dims - 1; d >= 0; d--) {
      place += rest % size[d] * stride[d];
      rest /= size[d];
    }
    visit(i, place);
  }
}

// What a block of a tensor is computed on: the tensor itself, or a copy where the block is cut off by
// the tensor's end or does not lie together in memory. Lanes past the end hold `zero`.
template <class T>
struct Staged {
  alignas(64) T copy[BLOCK];

  T* in(T* tensor, const int64_t* strides, int64_t first, int count, T zero = T(0)) {
    if (!strides && count == BLOCK) return tensor + first;
    for (int i = count; i < BLOCK; i++) copy[i] = zero;
    if (strides) {
      walk(strides, first, count, [&](int i, int64_t place) { copy[i] = tensor[place]; });
    } else {
      std::copy_n(tensor + first, count, copy);
    }
    return copy;
  }

  void out(T* tensor, const int64_t* strides, int64_t first, int count) {
    if (!strides && count == BLOCK) return;
    if (strides) {
      walk(strides, first, count, [&](int i, int64_t place) { tensor[place] = copy[i]; });
    } else {
      std::copy_n(copy, count, tensor + first);
    }
  }
};

// 8-bit states: codes and one scale for each block.
struct Blockwise {
  uint8_t* codes[Rule::STATES];
  float* absmax[Rule::STATES];

  struct Block {
    Staged<uint8_t> staged[Rule::STATES];
    uint8_t* codes[Rule::STATES];
    V scale[Rule::STATES], high[Rule::STATES];
    alignas(64) float fresh[Rule::STATES][BLOCK];
    std::tuple<Codec<true>, Codec<false>> codec;

    void in(const Blockwise& arena, int64_t offset, int64_t block, int count) {
      for (int s = 0; s < Rule::STATES; s++) {
        const uint8_t zero = Rule::SIGNED[s] ? 127 : 0;
        codes[s] = staged[s].in(arena.codes[s] + offset, nullptr, 0, count, zero);
        scale[s] = V(arena.absmax[s][block]);
        high[s] = V(0.f);
      }
    }
    template <int s>
    inline V decode(int i) const {
      return std::get<Codec<Rule::SIGNED[s]>>(codec).decode(codes[s] + i) * scale[s];
    }
    template <int s>
    inline void keep(int i, const V& value) {
      value.store(fresh[s] + i);
      high[s] = at::vec::clamp_min(high[s], Rule::SIGNED[s] ? value.abs() : value);
    }
    template <int s>
    void out(const Blockwise& arena, int64_t offset, int64_t block, int count) {
      float absmax = largest(high[s]);
      if (absmax < std::numeric_limits<float>::min()) absmax = 0.f;  // as ops/blockwise.py
      absmax = std::min(absmax, std::numeric_limits<float>::max());
      arena.absmax[s][block] = absmax;
      Codec<Rule::SIGNED[s]>::encode(fresh[s], absmax > 0.f ? 1.f / absmax : 0.f, codes[s]);
      staged[s].out(arena.codes[s] + offset, nullptr, 0, count);
    }
  };
};

// 32-bit states.
struct Full {
  float* state[Rule::STATES];

  struct Block {
    Staged<float> staged[Rule::STATES];
    float* state[Rule::STATES];

    void in(const Full& arena, int64_t offset, int64_t, int count) {
      for (int s = 0; s < Rule::STATES; s++)
        state[s] = staged[s].in(arena.state[s] + offset, nullptr, 0, count);
    }
    template <int s>
    inline V decode(int i) const {
      return V::loadu(state[s] + i);
    }
    template <int s>
    inline void keep(int i, const V& value) {
      value.store(state[s] + i);
    }
    template <int s>
    void out(const Full& arena, int64_t offset, int64_t, int count) {
      staged[s].out(arena.state[s] + offset, nullptr, 0, count);
    }
  };
};

template <class P, class G, class Storage, int... S>
void update_block(
    const Parameter& parameter, const Storage& arena, int64_t b, const float* shared,
    std::integer_sequence<int, S...>) {
  const int64_t first = b * BLOCK;
  const int count = (int)std::min<int64_t>(BLOCK, parameter.numel - first);
  Staged<P> staged_param;
  Staged<G> staged_grad;
  P* const data = (P*)parameter.data;
  P* const param = staged_param.in(data, parameter.data_strides, first, count);
  const G* const grad =
      staged_grad.in((G*)parameter.grad, parameter.grad_strides, first, count);
  typename Storage::Block block;
  block.in(arena, parameter.offset + first, parameter.block + b, count);

  V s[Rule::SCALARS];
  for (int k = 0; k < Rule::SCALARS; k++) s[k] = V(shared[k]);
  const auto update = [&](auto checked) {
    for (int i = 0; i < BLOCK; i += LANES) {
      const V old_param = load(param + i);
      const V old[] = {block.template decode<S>(i)...};
      V fresh[] = {old[S]...};
      V fresh_param = old_param;
      Rule::update(fresh_param, load(grad + i), fresh, s);
      if constexpr (checked) {
        const V finite =
            (V(0.f) + ... + fresh[S]).abs() < V(std::numeric_limits<float>::infinity());
        fresh_param = V::blendv(old_param, fresh_param, finite);
        ((fresh[S] = V::blendv(old[S], fresh[S], finite)), ...);
      }
      store(fresh_param, param + i);
      (block.template keep<S>(i, fresh[S]), ...);
    }
  };
  // An element whose states would not be finite stays as it is. Only a gradient that is not finite, or
  // whose square is not, can do that, so a look at the gradients spares the others the check.
  if (moderate(grad)) {
    update(std::false_type());
  } else {
    update(std::true_type());
  }
  staged_param.out(data, parameter.data_strides, first, count);
  (block.template out<S>(arena, parameter.offset + first, parameter.block + b, count), ...);
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
