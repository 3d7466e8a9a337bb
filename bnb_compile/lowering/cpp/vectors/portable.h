// Lane by lane, what ATen does not have.
template <class Lane>
inline I each_lane(const Lane& lane) {
  int32_t lanes[LANES];
  for (int k = 0; k < LANES; k++) lanes[k] = lane(k);
  return I::loadu(lanes);
}
struct Lanes {
  int32_t lanes[LANES];
  explicit Lanes(const I& x) {
    x.store(lanes);
  }
  inline int32_t operator[](int k) const {
    return lanes[k];
  }
};

inline I logical_shift(const I& x, const I& bits) {
  const Lanes from(x), by(bits);
  return each_lane([&](int k) { return (int32_t)((uint32_t)from[k] >> by[k]); });
}

inline I to_integers(const V& x) {
  return at::vec::convert<int32_t>(x);
}
inline I floor_to_integers(const V& x) {
  return to_integers(x.floor());
}
inline V to_numbers(const I& x) {
  return at::vec::convert<float>(x);
}

inline V rsqrt(const V& x) {
  return x.sqrt().reciprocal();
}
inline V reciprocal(const V& x) {
  return x.reciprocal();
}
inline V larger_magnitude(const V& x, const V& least) {
  return at::vec::clamp_min(x.abs(), least);
}

inline I read_4(const uint8_t* from) {
  return each_lane([&](int k) { return from[k / 2] >> 4 * (k % 2) & 15; });
}
inline void write_4(const I& x, uint8_t* to) {
  const Lanes lanes(x);
  for (int k = 0; k < LANES; k += 2) to[k / 2] = (uint8_t)(lanes[k] | lanes[k + 1] << 4);
}
template <class T>
inline I read_8(const T* from) {
  return each_lane([&](int k) { return (int32_t)from[k]; });
}
inline void write_8(const I& x, void* to) {
  const Lanes lanes(x);
  for (int k = 0; k < LANES; k++) ((uint8_t*)to)[k] = (uint8_t)lanes[k];
}
inline void write_saturated(const I* four, int plus, uint8_t* to) {
  for (int k = 0; k < 4; k++)
    write_8(at::vec::minimum(at::vec::maximum(four[k] + I(plus), I(0)), I(255)), to + k * LANES);
}
inline I read_16(const void* from) {
  return each_lane([&](int k) { return (int32_t)((const uint16_t*)from)[k]; });
}
inline void write_16(const I& x, void* to) {
  const Lanes lanes(x);
  for (int k = 0; k < LANES; k++) ((uint16_t*)to)[k] = (uint16_t)lanes[k];
}

struct Eight {
  const float* const entries;
  explicit Eight(const float* entries) : entries(entries) {}
  inline V operator[](const I& x) const {
    const Lanes index(x);
    float lanes[LANES];
    for (int k = 0; k < LANES; k++) lanes[k] = entries[index[k] & 7];
    return V::loadu(lanes);
  }
};
