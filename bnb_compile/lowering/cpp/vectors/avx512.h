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
#undef COMPARISON
inline V where(Mask mask, const V& a, const V& b) {
  return _mm512_mask_blend_ps(mask, b, a);
}
inline I where(Mask mask, const I& a, const I& b) {
  return _mm512_mask_blend_epi32(mask, b, a);
}
inline I plus_one(const I& x, Mask mask) {
  return _mm512_mask_add_epi32(x, mask, x, I(1));
}
inline I logical_shift(const I& x, const I& bits) {
  return _mm512_srlv_epi32(x, bits);
}

inline I to_integers(const V& x) {
  return _mm512_cvttps_epi32(x);
}
inline I floor_to_integers(const V& x) {
  return _mm512_cvt_roundps_epi32(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
inline V to_numbers(const I& x) {
  return _mm512_cvtepi32_ps(x);
}

// An instruction to 2^-14, and a step of Newton's.
inline V rsqrt(const V& x) {
  const V root = _mm512_rsqrt14_ps(x);
  return root * at::vec::fnmadd(x * V(0.5f), root * root, V(1.5f));
}
inline V reciprocal(const V& x) {
  const V inverse = _mm512_rcp14_ps(x);
  return inverse * at::vec::fnmadd(x, inverse, V(2.f));
}
inline V larger_magnitude(const V& x, const V& least) {
  constexpr int LARGER_MAGNITUDE = 0b1011;
  return _mm512_range_ps(x, least, LARGER_MAGNITUDE);
}

inline I read_4(const uint8_t* from) {
  const __m512i byte = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)from));
  return _mm512_and_si512(_mm512_or_si512(byte, _mm512_slli_epi64(byte, 28)), _mm512_set1_epi32(15));
}
inline void write_4(const I& x, uint8_t* to) {
  const __m512i byte = _mm512_or_si512(x, _mm512_srli_epi64(x, 28));
  _mm_storel_epi64((__m128i*)to, _mm512_cvtepi64_epi8(byte));
}
inline I read_8(const uint8_t* from) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline I read_8(const int8_t* from) {
  return _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline void write_8(const I& x, void* to) {
  _mm_storeu_si128((__m128i*)to, _mm512_cvtepi32_epi8(x));
}
inline void write_saturated(const I* four, int plus, uint8_t* to) {
  const __m512i added = _mm512_set1_epi16((int16_t)plus);
  const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(four[0], four[1]), added);
  const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(four[2], four[3]), added);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
inline I read_16(const void* from) {
  return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
}
inline void write_16(const I& x, void* to) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtepi32_epi16(x));
}
inline V read(const at::Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
inline void write(const V& value, at::Half* to) {
  constexpr int NEAREST_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph(value, NEAREST_EVEN));
}

struct Eight {
  const V entries;
  explicit Eight(const float* entries) : entries(_mm512_broadcast_f32x8(_mm256_loadu_ps(entries))) {}
  inline V operator[](const I& x) const {
    return _mm512_permutexvar_ps(x, entries);
  }
};
