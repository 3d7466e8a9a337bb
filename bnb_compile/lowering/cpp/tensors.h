// Blocks of tensors as vectors of floats, whatever their dtype and strides.

using V = at::vec::Vectorized<float>;
using I = at::vec::Vectorized<int32_t>;
constexpr int LANES = V::size();

template <class T>
inline V read(const T* from) {
  if constexpr (std::is_same_v<T, float>) {
    return V::loadu(from);
  } else {
    return at::vec::convert<float>(at::vec::Vectorized<T>::loadu(from, LANES));
  }
}

template <class T>
inline void write(const V& value, T* to) {
  if constexpr (std::is_same_v<T, float>) {
    value.store(to);
  } else {
    at::vec::convert<T>(value).store(to, LANES);
  }
}

// LANES numbers of 16 bits are half of a vector, and ATen's conversions are of whole ones. To bfloat16 numbers are
// rounded to nearest, of two equally near to the even one, and NaN stays NaN.
#if defined(CPU_CAPABILITY_AVX512)
inline V read(const at::BFloat16* from) {
  const __m512i half = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(half, 16));
}
inline void write(const V& value, at::BFloat16* to) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, even), _mm512_set1_epi32(0x7FFF));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7FC00000));
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
}
inline V read(const at::Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline void write(const V& value, at::Half* to) {
  constexpr int NEAREST_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, NEAREST_EVEN));
}
#elif defined(CPU_CAPABILITY_AVX2)
inline V read(const at::BFloat16* from) {
  const __m256i half = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(half, 16));
}
inline void write(const V& value, at::BFloat16* to) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, even), _mm256_set1_epi32(0x7FFF));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), is_nan);
  const __m256i high = _mm256_srli_epi32(kept, 16);
  const __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  _mm_storeu_si128((__m128i*)to, packed);
}
inline V read(const at::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline void write(const V& value, at::Half* to) {
  constexpr int NEAREST_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(value, NEAREST_EVEN));
}
#endif

// Between numbers and integers: bits, and values towards zero.
inline I as_integers(const V& x) {
  return at::vec::cast<int32_t>(x);
}
inline V as_numbers(const I& x) {
  return at::vec::cast<float>(x);
}
inline I to_integers(const V& x) {
  return at::vec::convert<int32_t>(x);
}
inline I floor_to_integers(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
#else
  return to_integers(x.floor());
#endif
}
inline V to_numbers(const I& x) {
  return at::vec::convert<float>(x);
}

// Comparisons, and a choice by them.
#if defined(CPU_CAPABILITY_AVX512)
using Mask = __mmask16;
#define COMPARISON(name, number, integer)                      \
  inline Mask name(const V& a, const V& b) {                   \
    return _mm512_cmp_ps_mask(a, b, number);                   \
  }                                                            \
  inline Mask name(const I& a, const I& b) {                   \
    return _mm512_cmp_epi32_mask(a, b, integer);               \
  }
COMPARISON(gt, _CMP_GT_OQ, _MM_CMPINT_NLE)
COMPARISON(ge, _CMP_GE_OQ, _MM_CMPINT_NLT)
COMPARISON(lt, _CMP_LT_OQ, _MM_CMPINT_LT)
COMPARISON(le, _CMP_LE_OQ, _MM_CMPINT_LE)
COMPARISON(eq, _CMP_EQ_OQ, _MM_CMPINT_EQ)
inline V where(Mask mask, const V& a, const V& b) {
  return _mm512_mask_blend_ps(mask, b, a);
}
inline I where(Mask mask, const I& a, const I& b) {
  return _mm512_mask_blend_epi32(mask, b, a);
}
#else
#define COMPARISON(name, symbol)                \
  inline V name(const V& a, const V& b) {       \
    return a symbol b;                          \
  }                                             \
  inline V name(const I& a, const I& b) {       \
    return as_numbers(a symbol b);              \
  }
COMPARISON(gt, >)
COMPARISON(ge, >=)
COMPARISON(lt, <)
COMPARISON(le, <=)
COMPARISON(eq, ==)
inline V where(const V& mask, const V& a, const V& b) {
  return V::blendv(b, a, mask);
}
inline I where(const V& mask, const I& a, const I& b) {
  return as_integers(V::blendv(as_numbers(b), as_numbers(a), mask));
}
#endif
#undef COMPARISON

// Zeros come from above.
inline I logical_shift(const I& x, const I& bits) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_srlv_epi32(x, bits);
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_srlv_epi32(x, bits);
#else
  int32_t lanes[LANES], by[LANES];
  x.store(lanes), bits.store(by);
  for (int k = 0; k < LANES; k++) lanes[k] = (int32_t)((uint32_t)lanes[k] >> by[k]);
  return I::loadu(lanes);
#endif
}

// The number of LANES elements, from the first one's on.
inline I numbers_from(int32_t first) {
  alignas(64) static constexpr int32_t LANE[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static_assert(LANES <= 16);
  return I(first) + I::loadu(LANE);
}

// 1 / sqrt(x) of a normal number above 0, and 1 / x of one that is not 0, to 2^-22: an instruction and a step of
// Newton's.
inline V rsqrt(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const V root = _mm512_rsqrt14_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const V root = _mm256_rsqrt_ps(x);
#else
  return x.sqrt().reciprocal();
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return root * at::vec::fnmadd(x * V(0.5f), root * root, V(1.5f));
#endif
}
inline V reciprocal(const V& x) {
#if defined(CPU_CAPABILITY_AVX512)
  const V inverse = _mm512_rcp14_ps(x);
#elif defined(CPU_CAPABILITY_AVX2)
  const V inverse = _mm256_rcp_ps(x);
#else
  return x.reciprocal();
#endif
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  return inverse * at::vec::fnmadd(x, inverse, V(2.f));
#endif
}

// LANES integers of 8 bits.
template <class T>
inline I read_integers(const T* from) {
  constexpr bool SIGNED = std::is_same_v<T, int8_t>;
#if defined(CPU_CAPABILITY_AVX512)
  const __m128i bytes = _mm_loadu_si128((const __m128i*)from);
  return SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)from);
  return SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
#else
  int32_t lanes[LANES];
  for (int k = 0; k < LANES; k++) lanes[k] = from[k];
  return I::loadu(lanes);
#endif
}

template <class T>
inline void write_integers(const I& integers, T* to) {
#if defined(CPU_CAPABILITY_AVX512)
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(integers));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i low_bytes = _mm256_set1_epi32(0x0C080400);
  const __m256i bytes = _mm256_shuffle_epi8(integers, low_bytes);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(low, high));
#else
  int32_t lanes[LANES];
  integers.store(lanes);
  for (int k = 0; k < LANES; k++) to[k] = (T)lanes[k];
#endif
}

// LANES integers of 4 bits, two in a byte, the first in its low half.
template <class T>
inline I read_nibbles(const T* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
  const I nibbles = _mm512_and_si512(
      _mm512_or_si512(byte, _mm512_slli_epi64(byte, 28)), _mm512_set1_epi32(15));
#elif defined(CPU_CAPABILITY_AVX2)
  int32_t four;
  std::memcpy(&four, from, 4);
  const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  const I nibbles =
      _mm256_and_si256(_mm256_or_si256(byte, _mm256_slli_epi64(byte, 28)), _mm256_set1_epi32(15));
#else
  int32_t lanes[LANES];
  for (int k = 0; k < LANES; k++) lanes[k] = (uint8_t)from[k / 2] >> 4 * (k % 2) & 15;
  const I nibbles = I::loadu(lanes);
#endif
  return std::is_same_v<T, int8_t> ? (nibbles ^ I(8)) - I(8) : nibbles;
}

template <class T>
inline void write_nibbles(const I& integers, T* to) {
  const I nibbles = integers & I(15);
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i byte = _mm512_or_si512(nibbles, _mm512_srli_epi64(nibbles, 28));
  _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8(byte));
#else
  int32_t lanes[LANES];
  nibbles.store(lanes);
  for (int k = 0; k < LANES; k += 2) to[k / 2] = (T)(lanes[k] | lanes[k + 1] << 4);
#endif
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
