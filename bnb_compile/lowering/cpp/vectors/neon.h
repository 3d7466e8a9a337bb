inline I logical_shift(const I& x, const I& bits) {
  return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(x), vnegq_s32(bits)));
}

inline I to_integers(const V& x) {
  return vcvtq_s32_f32(x);
}
inline I floor_to_integers(const V& x) {
  return vcvtmq_s32_f32(x);
}
inline V to_numbers(const I& x) {
  return vcvtq_f32_s32(x);
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

inline uint32_t load_word(const void* from) {
  uint32_t word;
  std::memcpy(&word, from, 4);
  return word;
}
inline I read_4(const uint8_t* from) {
  uint16_t four;
  std::memcpy(&four, from, 2);
  static constexpr int32_t RIGHT[] = {0, -4, -8, -12};
  const uint32x4_t first = vshlq_u32(vdupq_n_u32(four), vld1q_s32(RIGHT));
  return vreinterpretq_s32_u32(vandq_u32(first, vdupq_n_u32(15)));
}
inline void write_4(const I& x, uint8_t* to) {
  static constexpr int32_t LEFT[] = {0, 4, 8, 12};
  const uint16_t four = (uint16_t)vaddvq_u32(vshlq_u32(vreinterpretq_u32_s32(x), vld1q_s32(LEFT)));
  std::memcpy(to, &four, 2);
}
inline I read_8(const uint8_t* from) {
  const uint8x8_t bytes = vreinterpret_u8_u32(vdup_n_u32(load_word(from)));
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(bytes))));
}
inline I read_8(const int8_t* from) {
  const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(load_word(from)));
  return vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
}
inline void write_8(const I& x, void* to) {
  const uint16x4_t shorts = vmovn_u32(vreinterpretq_u32_s32(x));
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(shorts, shorts));
  const uint32_t word = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  std::memcpy(to, &word, 4);
}
inline void write_saturated(const I* four, int plus, uint8_t* to) {
  const int16x8_t added = vdupq_n_s16((int16_t)plus);
  const int16x8_t low = vaddq_s16(vcombine_s16(vqmovn_s32(four[0]), vqmovn_s32(four[1])), added);
  const int16x8_t high = vaddq_s16(vcombine_s16(vqmovn_s32(four[2]), vqmovn_s32(four[3])), added);
  vst1q_u8(to, vcombine_u8(vqmovun_s16(low), vqmovun_s16(high)));
}
inline I read_16(const void* from) {
  return vreinterpretq_s32_u32(vmovl_u16(vld1_u16((const uint16_t*)from)));
}
inline void write_16(const I& x, void* to) {
  vst1_u16((uint16_t*)to, vmovn_u32(vreinterpretq_u32_s32(x)));
}
inline V read(const at::Half* from) {
  return vcvt_f32_f16(vld1_f16((const float16_t*)from));
}
inline void write(const V& value, at::Half* to) {
  vst1_f16((float16_t*)to, vcvt_f16_f32(value));
}

struct Eight {
  uint8x16x2_t entries;
  explicit Eight(const float* from) : entries{vld1q_u8((const uint8_t*)from), vld1q_u8((const uint8_t*)(from + 4))} {}
  inline V operator[](const I& x) const {
    // Of an entry, four bytes.
    const uint32x4_t index = vandq_u32(vreinterpretq_u32_s32(x), vdupq_n_u32(7));
    const uint32x4_t bytes = vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404));
    return vreinterpretq_f32_u8(vqtbl2q_u8(entries, vreinterpretq_u8_u32(bytes)));
  }
};
