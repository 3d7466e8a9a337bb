// Where a mask is a vector of which lanes have all bits, or none.
using Mask = V;
#define COMPARISON(name, symbol)                \
  inline Mask name(const V& a, const V& b) {    \
    return a symbol b;                          \
  }                                             \
  inline Mask name(const I& a, const I& b) {    \
    return as_numbers(a symbol b);              \
  }
COMPARISON(gt, >)
COMPARISON(ge, >=)
COMPARISON(lt, <)
COMPARISON(le, <=)
COMPARISON(eq, ==)
#undef COMPARISON
inline V where(const Mask& mask, const V& a, const V& b) {
  return V::blendv(b, a, mask);
}
inline I where(const Mask& mask, const I& a, const I& b) {
  return as_integers(V::blendv(as_numbers(b), as_numbers(a), mask));
}
inline I plus_one(const I& x, const Mask& mask) {
  return x - as_integers(mask);  // all bits are -1
}
