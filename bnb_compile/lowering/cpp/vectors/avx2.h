inline I logical_shift(const I& x, const I& bits) {
  return _mm256_srlv_epi32(x, bits);
}

inline I to_integers(const V& x) {
  return _mm256_cvttps_epi32(x);
}
inline I floor_to_integers(const V& x) {
  return to_integers(x.floor());
}
inline V to_numbers(const I& x) {
  return _mm256_cvtepi32_ps(x);
}

// An instruction to 2^-11, and a step of Newton's.
inline V rsqrt(const V& x) {
  const V root = _mm256_rsqrt_ps(x);
  return root * at::vec::fnmadd(x * V(0.5f), root * root, V(1.5f));
}
inline V reciprocal(const V& x) {
  const V inverse = _mm256_rcp_ps(x);
  return inverse * at::vec::fnmadd(x, inverse, V(2.f));
}
inline V larger_magnitude(const V& x, const V& least) {
  return at::vec::clamp_min(x.abs(), least);
}

inline I read_4(const uint8_t* from) {
  int32_t four;
  std::memcpy(&four, from, 4);
  const __m256i byte = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
  return _mm256_and_si256(_mm256_or_si256(byte, _mm256_slli_epi64(byte, 28)), _mm256_set1_epi32(15));
}
inline void write_4(const I& x, uint8_t* to) {
  const __m256i byte = _mm256_or_si256(x, _mm256_srli_epi64(x, 28));
  const __m256i two = _mm256_shuffle_epi8(byte, _mm256_set1_epi64x((int64_t)0x8080808080800800));
  const __m128i low = _mm256_castsi256_si128(two), high = _mm256_extracti128_si256(two, 1);
  const int32_t four = _mm_cvtsi128_si32(_mm_unpacklo_epi16(low, high));
  std::memcpy(to, &four, 4);
}
inline I read_8(const uint8_t* from) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
inline I read_8(const int8_t* from) {
  return _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
}
inline void write_8(const I& x, void* to) {
  const __m256i bytes = _mm256_shuffle_epi8(x, _mm256_set1_epi32(0x0C080400));
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64((__m128i*)to, _mm_unpacklo_epi32(low, high));
}
inline void write_saturated(const I* four, int plus, uint8_t* to) {
  const __m256i added = _mm256_set1_epi16((int16_t)plus);
  const __m256i low = _mm256_add_epi16(_mm256_packs_epi32(four[0], four[1]), added);
  const __m256i high = _mm256_add_epi16(_mm256_packs_epi32(four[2], four[3]), added);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  _mm256_storeu_si256((__m256i*)to, packed);
}
inline I read_16(const void* from) {
  return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from));
}
inline void write_16(const I& x, void* to) {
  const __m256i shorts = _mm256_shuffle_epi8(x, _mm256_set1_epi64x(0x0D0C090805040100));
  const __m128i low = _mm256_castsi256_si128(shorts), high = _mm256_extracti128_si256(shorts, 1);
  _mm_storeu_si128((__m128i*)to, _mm_unpacklo_epi64(low, high));
}
inline V read(const at::Half* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
inline void write(const V& value, at::Half* to) {
  constexpr int NEAREST_EVEN = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(value, NEAREST_EVEN));
}

struct Eight {
  const V entries;
  explicit Eight(const float* entries) : entries(V::loadu(entries)) {}
  inline V operator[](const I& x) const {
    return _mm256_permutevar8x32_ps(entries, x);
  }
};
