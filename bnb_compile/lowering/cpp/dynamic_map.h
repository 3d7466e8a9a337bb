// The codes of the dynamic map for processors that permute a vector by another one. M is the map as any table,
// see stored.h, and has besides those of codebook.register_tables.

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
template <class M, bool SIGNED>
struct MapCodes {
  using Entry = uint8_t;
  using Number = V;
  static constexpr bool VECTORS = false;
  static constexpr int PER = 1;
  static constexpr uint8_t zero = M::ZERO;
  const V slope = table(M::SLOPE), start = table(M::START);

  // Eight entries, by the low 3 bits of an index.
  static inline V table(const float* entries) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_broadcast_f32x8(_mm256_loadu_ps(entries));
#else
    return V::loadu(entries);
#endif
  }
  static inline V look_up(const V& entries, const I& index) {
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_permutexvar_ps(index, entries);
#else
    return _mm256_permutevar8x32_ps(entries, index);
#endif
  }

  inline V load(const uint8_t* codes, int i) const {
    // As the low bits of 2^23 a code is a float: 2^23 + code.
    const V above = as_numbers(read_integers(codes + i) | as_integers(V(0x1p23f)));
    constexpr float scale = SIGNED ? 4.f : 2.f, at_0 = SIGNED ? -4 * 127.f : 3.f;
    const V t = at::vec::fmadd(above, V(scale), V(at_0 - scale * 0x1p23f));
    const I exponent = logical_shift(as_integers(t), I(23));  // the sign is above it
    const V begin = look_up(start, exponent);
    return at::vec::fmadd(t, look_up(slope, exponent), SIGNED ? begin ^ (t & V(-0.f)) : begin);
  }

  struct Encoder {
    const V above = table(M::ABOVE), per_unit = table(M::PER_UNIT), first = table(M::FIRST);
    // The cell, with the sign of x.
    inline I operator()(const V& x) const {
      const V a = larger_magnitude(x);
      // Added to 3 * 2^22 a number is rounded to an integer, in the low bits.
      constexpr float BIAS = M::BIAS[0] + 0x1.8p23;
      I decade = as_integers(at::vec::fmadd(to_numbers(as_integers(a)), V(M::PER_BIT[0]), V(BIAS)));
      decade = plus_one(decade, gt(a, look_up(above, decade)));
      const V start = look_up(first, decade);
      const V position = at::vec::fmadd(a, look_up(per_unit, decade), start);
      // A decade's last cell is 9/4 start - 1 (+ 5/4 in the unsigned map); a half more keeps rounding from
      // ending one cell before it.
      const V end = at::vec::fmadd(start, V(2.25f), V(SIGNED ? -0.5f : 0.75f));
      const V cell = at::vec::clamp_max(position, end);
      if constexpr (SIGNED) return to_integers(cell | (x & V(-0.f)));
      // The other half of never_zero: 0 itself must become code 0 again. The bits of a float above 0, as an
      // integer, are larger than any code; those of 0 are 0.
      return at::vec::minimum(to_integers(cell), as_integers(x));
    }
    // Of x and the least that the tables are for: without a sign that is the smallest value, as a number above 0
    // is not rounded to 0 (codebook.never_zero).
    static inline V larger_magnitude(const V& x) {
      const V least(M::LEAST[0]);
      if constexpr (!SIGNED) return at::vec::clamp_min(x, least);
#if defined(CPU_CAPABILITY_AVX512)
      constexpr int LARGER_MAGNITUDE = 0b1011;
      return _mm512_range_ps(x, least, LARGER_MAGNITUDE);
#else
      return at::vec::clamp_min(x.abs(), least);
#endif
    }
    static inline I plus_one(const I& x, const decltype(gt(V(), V()))& where) {
#if defined(CPU_CAPABILITY_AVX512)
      return _mm512_mask_add_epi32(x, where, x, I(1));
#else
      return x - as_integers(where);  // all bits are -1
#endif
    }
  };

  template <class Number>
  static inline void store(const Number& number, uint8_t* codes) {
    const Encoder encoder;
    for (int i = 0; i < BLOCK; i += 4 * LANES) {
      I cell[4];
      for (int k = 0; k < 4; k++) cell[k] = encoder(number(i + k * LANES));
      // Saturating, so that cell -128 is code 0: the map has 1.0 but no -1.0.
#if defined(CPU_CAPABILITY_AVX512)
      const __m512i zeros = _mm512_set1_epi16(zero);
      const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(cell[0], cell[1]), zeros);
      const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(cell[2], cell[3]), zeros);
      const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
      _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
#else
      const __m256i zeros = _mm256_set1_epi16(zero);
      const __m256i low = _mm256_add_epi16(_mm256_packs_epi32(cell[0], cell[1]), zeros);
      const __m256i high = _mm256_add_epi16(_mm256_packs_epi32(cell[2], cell[3]), zeros);
      const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
      const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256((__m256i*)(codes + i), packed);
#endif
    }
  }
};
#else
template <class M, bool SIGNED>
using MapCodes = Codes<M>;
#endif
