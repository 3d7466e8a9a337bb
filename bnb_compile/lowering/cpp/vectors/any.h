// Vectors of floats and of integers: ATen's, and what each instruction set adds to them, a file each, with
//
//   Mask, gt, ge, lt, le, eq, where(mask, a, b)   comparisons of both kinds, and a choice by them
//   logical_shift(x, bits)                        zeros come from above
//   to_integers(x), floor_to_integers(x), to_numbers(x)   by value; towards zero, or down
//   rsqrt(x), reciprocal(x)                       1 / sqrt(x) of a normal number above 0, and 1 / x of one that
//                                                 is not 0, to 2^-22
//   read_4, read_8, read_16(from)                 LANES integers of so many bits, without a sign; of 8, int8_t
//   write_4, write_8, write_16(x, to)             have one. Of 4 bits there are two in a byte, first the low ones
//   write_saturated(four, plus, to)               4 * LANES bytes: integers of at least -2^15 and below 2^15 -
//                                                 plus, to which plus is added, and which end at 0 and at 255
//   read, write                                   of at::Half, if ATen's are not of LANES numbers
//   larger_magnitude(x, least)                    |x|, or least if that is larger
//   plus_one(x, mask)                             integers, one more where the mask is
//   Eight(entries)[x]                             of 8 floats, by the low 3 bits of integers

using V = at::vec::Vectorized<float>;
using I = at::vec::Vectorized<int32_t>;
constexpr int LANES = V::size();

// Bits as they are.
inline I as_integers(const V& x) {
  return at::vec::cast<int32_t>(x);
}
inline V as_numbers(const I& x) {
  return at::vec::cast<float>(x);
}

// LANES numbers.
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
