// Blocks of tensors as vectors of floats, whatever their dtype and strides.

// bfloat16 numbers are the high halves of floats. They are rounded to nearest, of two equally near to the even one, and
// NaN stays NaN.
inline V read(const at::BFloat16* from) {
  return as_numbers(read_16(from) << I(16));
}
inline void write(const V& value, at::BFloat16* to) {
  const I bits = as_integers(value);
  const I even = logical_shift(bits, I(16)) & I(1);
  const I rounded = where(eq(value, value), bits + even + I(0x7FFF), I(0x7FC00000));
  write_16(logical_shift(rounded, I(16)), to);
}

// Numbers of 8 bits, by those of their mantissa: 3 of e4m3fn, 2 of e5m2. They are rounded to nearest, of two equally
// near to the even one. What is written is at most the largest that there is, or NaN.
template <int MANTISSA>
struct Float8 {
  static constexpr int SHIFT = 23 - MANTISSA;
  static constexpr int REBIAS = 127 - (1 << (6 - MANTISSA)) + 1;
  static constexpr int INFINITE = MANTISSA == 2 ? 0x7C : 0x7F;  // or NaN, what is above is
  static constexpr float LEAST_NORMAL = MANTISSA == 2 ? 0x1p-14f : 0x1p-6f;

  static inline V read(const void* from) {
    const I code = read_8((const uint8_t*)from), magnitude = code & I(0x7F), bits = magnitude << I(SHIFT);
    const V normal = as_numbers(bits + I(REBIAS << 23));
    const V below = as_numbers(bits + I((REBIAS + 1) << 23)) - V(LEAST_NORMAL);
    const V above = as_numbers(bits | I(MANTISSA == 2 ? 0x7F800000 : 0x7FC00000));
    const V finite = where(lt(bits, I(1 << 23)), below, normal);
    return where(ge(magnitude, I(INFINITE)), above, finite) | as_numbers((code ^ magnitude) << I(24));
  }
  static inline void write(const V& value, void* to) {
    const V a = value.abs();
    const I bits = as_integers(a), even = logical_shift(bits, I(SHIFT)) & I(1);
    const I normal = logical_shift(bits + even + I((1 << (SHIFT - 1)) - 1), I(SHIFT)) - I(REBIAS << MANTISSA);
    // Added to so much, a number is rounded to units of the last place.
    const V large(LEAST_NORMAL * (1 << SHIFT));
    const I below = as_integers(a + large) - as_integers(large);
    const I finite = where(lt(a, V(LEAST_NORMAL)), below, normal);
    const I code = where(eq(a, a), finite, I(0x7F));
    write_8(code | logical_shift(as_integers(value), I(31)) << I(7), to);
  }
};
inline V read(const at::Float8_e4m3fn* from) {
  return Float8<3>::read(from);
}
inline V read(const at::Float8_e5m2* from) {
  return Float8<2>::read(from);
}
inline void write(const V& value, at::Float8_e4m3fn* to) {
  Float8<3>::write(value, to);
}
inline void write(const V& value, at::Float8_e5m2* to) {
  Float8<2>::write(value, to);
}

// Integers of 4 bits, with a sign or without.
template <class T>
inline I read_nibbles(const T* from) {
  const I nibbles = read_4((const uint8_t*)from);
  return std::is_same_v<T, int8_t> ? (nibbles ^ I(8)) - I(8) : nibbles;
}
template <class T>
inline void write_nibbles(const I& integers, T* to) {
  write_4(integers & I(15), (uint8_t*)to);
}

// The number of LANES elements, from the first one's on.
inline I numbers_from(int32_t first) {
  alignas(64) static constexpr int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(LANES <= 16);
  return I(first) + I::loadu(LANE);
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

  Staged() {}  // a tuple of these would fill them with zeros

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

inline float largest(const V& value) {
  return at::vec::vec_reduce_all<float>(
      [](const V& a, const V& b) { return at::vec::clamp_min(a, b); }, value);
}

inline float sum(const V& value) {
  return at::vec::vec_reduce_all<float>([](const V& a, const V& b) { return a + b; }, value);
}

// Divides the chunks of many tensors among threads: calls visit(k, from, to, passed) for chunks `from` to `to` of
// tensor k, which has chunks(k), after `passed` chunks of the tensors before it. A thread is worth waking for
// `least` chunks.
template <class Chunks, class Visit>
inline void share_out(int64_t count, int64_t least, const Chunks& chunks, const Visit& visit) {
  int64_t total = 0;
  for (int64_t k = 0; k < count; k++) total += chunks(k);
  const int threads = (int)std::max<int64_t>(1, std::min<int64_t>(omp_get_max_threads(), total / least));
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    const int64_t team = omp_get_num_threads(), member = omp_get_thread_num();
    const int64_t begin = total * member / team, end = total * (member + 1) / team;
    int64_t passed = 0;
    for (int64_t k = 0; k < count && passed < end; k++) {
      const int64_t from = std::max(begin, passed) - passed;
      const int64_t to = std::min(end - passed, chunks(k));
      if (from < to) visit(k, from, to, passed);
      passed += chunks(k);
    }
  }
}
