using Mask = vls_pred_t;
#define COMPARISON(name)                                       \
  inline Mask name(const V& a, const V& b) {                   \
    return svcmp##name##_f32(svptrue_b32(), a, b);             \
  }                                                            \
  inline Mask name(const I& a, const I& b) {                   \
    return svcmp##name##_s32(svptrue_b32(), a, b);             \
  }
COMPARISON(gt)
COMPARISON(ge)
COMPARISON(lt)
COMPARISON(le)
COMPARISON(eq)
#undef COMPARISON
inline V where(Mask mask, const V& a, const V& b) {
  return svsel_f32(mask, a, b);
}
inline I where(Mask mask, const I& a, const I& b) {
  return svsel_s32(mask, a, b);
}
inline I plus_one(const I& x, Mask mask) {
  return svadd_n_s32_m(mask, x, 1);
}
inline svuint32_t unsigned_of(const I& x) {
  return svreinterpret_u32_s32(x);
}
inline I logical_shift(const I& x, const I& bits) {
  return svreinterpret_s32_u32(svlsr_u32_x(svptrue_b32(), unsigned_of(x), unsigned_of(bits)));
}

inline I to_integers(const V& x) {
  return svcvt_s32_f32_x(svptrue_b32(), x);
}
inline I floor_to_integers(const V& x) {
  return svcvt_s32_f32_x(svptrue_b32(), svrintm_f32_x(svptrue_b32(), x));
}
inline V to_numbers(const I& x) {
  return svcvt_f32_s32_x(svptrue_b32(), x);
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
  uint32_t eight;
  std::memcpy(&eight, from, 4);
  const svuint32_t first = svlsr_u32_x(svptrue_b32(), svdup_n_u32(eight), svindex_u32(0, 4));
  return svreinterpret_s32_u32(svand_n_u32_x(svptrue_b32(), first, 15));
}
inline void write_4(const I& x, uint8_t* to) {
  const svuint32_t apart = svlsl_u32_x(svptrue_b32(), unsigned_of(x), svindex_u32(0, 4));
  const uint32_t eight = svorv_u32(svptrue_b32(), apart);
  std::memcpy(to, &eight, 4);
}
inline I read_8(const uint8_t* from) {
  return svld1ub_s32(svptrue_b32(), from);
}
inline I read_8(const int8_t* from) {
  return svld1sb_s32(svptrue_b32(), from);
}
inline void write_8(const I& x, void* to) {
  svst1b_s32(svptrue_b32(), (int8_t*)to, x);
}
inline void write_saturated(const I* four, int plus, uint8_t* to) {
  for (int k = 0; k < 4; k++) {
    const svint32_t added = svadd_n_s32_x(svptrue_b32(), four[k], plus);
    const svint32_t least = svmax_n_s32_x(svptrue_b32(), added, 0);
    write_8(svmin_n_s32_x(svptrue_b32(), least, 255), to + k * LANES);
  }
}
inline I read_16(const void* from) {
  return svld1uh_s32(svptrue_b32(), (const uint16_t*)from);
}
inline void write_16(const I& x, void* to) {
  svst1h_s32(svptrue_b32(), (int16_t*)to, x);
}
inline V read(const at::Half* from) {
  return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_s32(read_16(from)));
}
inline void write(const V& value, at::Half* to) {
  write_16(svreinterpret_s32_f16(svcvt_f16_f32_x(svptrue_b32(), value)), to);
}

struct Eight {
  static_assert(LANES == 8);
  const V entries;
  explicit Eight(const float* entries) : entries(V::loadu(entries)) {}
  inline V operator[](const I& x) const {
    return svtbl_f32(entries, svand_n_u32_x(svptrue_b32(), unsigned_of(x), 7));
  }
};
