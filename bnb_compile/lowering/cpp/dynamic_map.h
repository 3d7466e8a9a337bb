// The codes of the dynamic map, with tables that fit into a vector register. M is the map as any table, see
// stored.h, and has besides those of codebook.register_tables.

template <class M, bool SIGNED>
struct MapCodes {
  using Entry = uint8_t;
  using Number = V;
  static constexpr bool VECTORS = false;
  static constexpr int PER = 1;
  static constexpr uint8_t zero = M::ZERO;
  const Eight slope{M::SLOPE}, start{M::START};

  inline V load(const uint8_t* codes, int i) const {
    // As the low bits of 2^23 a code is a float: 2^23 + code.
    const V above = as_numbers(read_8(codes + i) | as_integers(V(0x1p23f)));
    constexpr float scale = SIGNED ? 4.f : 2.f, at_0 = SIGNED ? -4 * 127.f : 3.f;
    const V t = at::vec::fmadd(above, V(scale), V(at_0 - scale * 0x1p23f));
    const I exponent = logical_shift(as_integers(t), I(23));  // the sign is above it
    const V begin = start[exponent];
    return at::vec::fmadd(t, slope[exponent], SIGNED ? begin ^ (t & V(-0.f)) : begin);
  }

  struct Encoder {
    const Eight above{M::ABOVE}, per_unit{M::PER_UNIT}, first{M::FIRST};
    // The cell, with the sign of x.
    inline I operator()(const V& x) const {
      // Of x and the least that the tables are for: without a sign that is the smallest value, as a number above 0
      // is not rounded to 0 (codebook.never_zero).
      const V least(M::LEAST[0]);
      const V a = SIGNED ? larger_magnitude(x, least) : at::vec::clamp_min(x, least);
      // Added to 3 * 2^22 a number is rounded to an integer, in the low bits.
      constexpr float BIAS = M::BIAS[0] + 0x1.8p23;
      I decade = as_integers(at::vec::fmadd(to_numbers(as_integers(a)), V(M::PER_BIT[0]), V(BIAS)));
      decade = plus_one(decade, gt(a, above[decade]));
      const V start = first[decade];
      const V position = at::vec::fmadd(a, per_unit[decade], start);
      // A decade's last cell is 9/4 start - 1 (+ 5/4 in the unsigned map); a half more keeps rounding from
      // ending one cell before it.
      const V end = at::vec::fmadd(start, V(2.25f), V(SIGNED ? -0.5f : 0.75f));
      const V cell = at::vec::clamp_max(position, end);
      if constexpr (SIGNED) return to_integers(cell | (x & V(-0.f)));
      // The other half of never_zero: 0 itself must become code 0 again. The bits of a float above 0, as an
      // integer, are larger than any code; those of 0 are 0.
      return at::vec::minimum(to_integers(cell), as_integers(x));
    }
  };

  template <class Number>
  static inline void store(const Number& number, uint8_t* codes) {
    const Encoder encoder;
    for (int i = 0; i < BLOCK; i += 4 * LANES) {
      I cell[4];
      for (int k = 0; k < 4; k++) cell[k] = encoder(number(i + k * LANES));
      // Saturating, so that cell -128 is code 0: the map has 1.0 but no -1.0.
      write_saturated(cell, zero, codes + i);
    }
  }
};
