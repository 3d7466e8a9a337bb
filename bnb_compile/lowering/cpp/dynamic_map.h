// The codes of the dynamic map for AVX-512, where tables indexed by exponent bits fit into registers. M is the
// map as any table, see stored.h, and has besides
//   SLOPE[16], START[16]           decode, by the binade of 2*cell + 1
//   ABOVE[32], PER_UNIT[32], FIRST[32]   encode, by the binade of the magnitude

#if defined(CPU_CAPABILITY_AVX512)
template <class M, bool SIGNED>
struct MapCodes {
  using Entry = uint8_t;
  using Number = V;
  static constexpr bool VECTORS = false;
  static constexpr int PER = 1;
  static constexpr uint8_t zero = M::ZERO;
  const __m512 slope = _mm512_loadu_ps(M::SLOPE), start = _mm512_loadu_ps(M::START);

  // t = 2*cell + 1 is odd, so that cell 0 has a binade of its own, with zeros in the tables.
  inline V load(const uint8_t* codes, int i) const {
    const __m512 code =
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(codes + i))));
    __m512 t, sign = _mm512_setzero_ps();
    if constexpr (SIGNED) {
      const __m512 twice = _mm512_fmadd_ps(code, _mm512_set1_ps(2.f), _mm512_set1_ps(-254.f));
      sign = _mm512_and_ps(twice, _mm512_set1_ps(-0.f));
      t = _mm512_add_ps(_mm512_abs_ps(twice), _mm512_set1_ps(1.f));
    } else {
      t = _mm512_fmadd_ps(code, _mm512_set1_ps(2.f), _mm512_set1_ps(3.f));
    }
    const __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(t), 23);
    const __m512 value = _mm512_fmadd_ps(
        t, _mm512_permutexvar_ps(binade, slope), _mm512_permutexvar_ps(binade, start));
    return SIGNED ? _mm512_or_ps(value, sign) : value;
  }

  // The tables of a binade hold the segment at its lower end; above the one threshold that it may
  // contain, the segment is that of the next binade.
  struct Encoder {
    __m512 above[2], per_unit[2], first[2];
    static inline void load(__m512* half, const float* table) {
      half[0] = _mm512_loadu_ps(table);
      half[1] = _mm512_loadu_ps(table + 16);
    }
    Encoder() {
      load(above, M::ABOVE), load(per_unit, M::PER_UNIT), load(first, M::FIRST);
    }
    static inline __m512 look_up(const __m512* half, __m512i index) {
      return _mm512_permutex2var_ps(half[0], index, half[1]);
    }
    // The cell, with the sign of x.
    inline __m512i operator()(__m512 x) const {
      // 2^-30 is far below the first threshold and still in the tables. Without a sign a number above 0 is not
      // rounded to 0 (codebook.never_zero), so everything smaller is encoded as the smallest value.
      const __m512 tiny = _mm512_set1_ps(SIGNED ? 0x1p-30f : M::VALUES[1]);
      constexpr int LARGER_MAGNITUDE = 0b1011;
      const __m512 a =
          SIGNED ? _mm512_range_ps(x, tiny, LARGER_MAGNITUDE) : _mm512_max_ps(x, tiny);
      __m512i binade = _mm512_srli_epi32(_mm512_castps_si512(a), 23);
      const __mmask16 over = _mm512_cmp_ps_mask(a, look_up(above, binade), _CMP_GT_OQ);
      binade = _mm512_mask_add_epi32(binade, over, binade, _mm512_set1_epi32(1));
      const __m512 start = look_up(first, binade);
      const __m512 position = _mm512_fmadd_ps(a, look_up(per_unit, binade), start);
      // A decade's last cell is 9/4 start - 1 (+ 5/4 in the unsigned map); a half more keeps rounding from
      // ending one cell before it.
      const __m512 end = _mm512_fmadd_ps(
          start, _mm512_set1_ps(2.25f), _mm512_set1_ps(SIGNED ? -0.5f : 0.75f));
      __m512 cell = _mm512_min_ps(position, end);
      if constexpr (SIGNED) {
        const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.f));
        cell = _mm512_or_ps(cell, sign);
      }
      const __m512i code = _mm512_cvttps_epi32(cell);
      // The other half of never_zero: 0 itself must become code 0 again. The bits of a float above 0, as an
      // integer, are larger than any code; those of 0 are 0.
      return SIGNED ? code : _mm512_min_epi32(code, _mm512_castps_si512(x));
    }
  };

  template <class Number>
  static inline void store(const Number& number, uint8_t* codes) {
    const Encoder encoder;
    const __m512i zero_code = _mm512_set1_epi16(zero);
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    for (int i = 0; i < BLOCK; i += 64) {
      __m512i cell[4];
      for (int k = 0; k < 4; k++) cell[k] = encoder(number(i + 16 * k));
      // Saturating, so that cell -128 is code 0: the map has 1.0 but no -1.0.
      const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(cell[0], cell[1]), zero_code);
      const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(cell[2], cell[3]), zero_code);
      const __m512i packed = _mm512_packus_epi16(low, high);
      _mm512_storeu_si512(codes + i, _mm512_permutexvar_epi32(order, packed));
    }
  }
};
#else
template <class M, bool SIGNED>
using MapCodes = Codes<M>;
#endif
