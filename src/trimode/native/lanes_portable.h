// Sixteen lanes as plain arrays: any processor, and the compiler's own vectors where it has some.
#pragma once
#include <cmath>
#include <cstring>

namespace trimode {
namespace {

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};
struct Bytes {
  uint8_t v[64];
};

#define TRIMODE_EACH(type, expression) \
  type out;                            \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out

inline Floats zero() { TRIMODE_EACH(Floats, 0.0f); }
inline Floats all(float x) { TRIMODE_EACH(Floats, x); }
inline Floats load(const float* p) { TRIMODE_EACH(Floats, p[i]); }
inline void store(float* p, const Floats& x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats load_halves(const uint16_t* p) { TRIMODE_EACH(Floats, half_to_float(p[i])); }
inline void store_halves(uint16_t* p, const Floats& x) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_half(x.v[i]);
}
// two roundings: a fused one is a slow library call where the processor has none
inline Floats fma(const Floats& a, const Floats& b, const Floats& c) { TRIMODE_EACH(Floats, a.v[i] * b.v[i] + c.v[i]); }
inline Floats mul(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] * b.v[i]); }
inline Floats add(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] + b.v[i]); }
inline Floats sub(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] - b.v[i]); }
inline Floats div(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] / b.v[i]); }
inline Floats max(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
inline Floats min(const Floats& a, const Floats& b) { TRIMODE_EACH(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
inline Floats absolute(const Floats& a) { TRIMODE_EACH(Floats, std::fabs(a.v[i])); }
inline Floats rounded(const Floats& a) { TRIMODE_EACH(Floats, std::nearbyint(a.v[i])); }
inline Floats scaled_by_power(const Floats& a, const Floats& n) { TRIMODE_EACH(Floats, std::ldexp(a.v[i], (int)n.v[i])); }
inline float greatest(const Floats& a) {
  float best = a.v[0];
  for (int i = 1; i < 16; ++i) best = a.v[i] > best ? a.v[i] : best;
  return best;
}
inline float sum(const Floats& a) {
  float total = 0.0f;
  for (int i = 0; i < 16; ++i) total += a.v[i];
  return total;
}
inline Floats to_floats(const Ints& a) { TRIMODE_EACH(Floats, (float)a.v[i]); }
inline Ints to_ints(const Floats& a) { TRIMODE_EACH(Ints, (int32_t)std::nearbyint(a.v[i])); }
inline Ints all_ints(int32_t x) { TRIMODE_EACH(Ints, x); }
inline Ints add(const Ints& a, const Ints& b) { TRIMODE_EACH(Ints, a.v[i] + b.v[i]); }
inline int32_t sum(const Ints& a) {
  int32_t total = 0;
  for (int i = 0; i < 16; ++i) total += a.v[i];
  return total;
}
inline void store_bytes(int8_t* p, const Ints& a) {
  for (int i = 0; i < 16; ++i) p[i] = (int8_t)a.v[i];
}
inline float bf16_at(const uint8_t* p, int index) {
  uint16_t half;
  std::memcpy(&half, p + 2 * index, 2);
  const uint32_t bits = (uint32_t)half << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline Floats low_bf16(const uint8_t* p) { TRIMODE_EACH(Floats, bf16_at(p, 2 * i)); }
inline Floats high_bf16(const uint8_t* p) { TRIMODE_EACH(Floats, bf16_at(p, 2 * i + 1)); }
inline Bytes load_bytes(const uint8_t* p) {
  Bytes out;
  std::memcpy(out.v, p, 64);
  return out;
}
inline Bytes flipped(const Bytes& b) {  // signed to unsigned: + 128
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = b.v[i] ^ 0x80;
  return out;
}
inline Bytes low_nibbles(const Bytes& b) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = b.v[i] & 15;
  return out;
}
inline Bytes high_nibbles(const Bytes& b) {
  Bytes out;
  for (int i = 0; i < 64; ++i) out.v[i] = b.v[i] >> 4;
  return out;
}
template <int J>
inline Floats byte_of(const Bytes& b) {
  TRIMODE_EACH(Floats, (float)b.v[4 * i + J]);
}
template <bool kIsBiased>
inline Ints dot(const Ints& acc, const Bytes& w, int32_t x) {
  int8_t four[4];
  std::memcpy(four, &x, 4);
  TRIMODE_EACH(Ints, acc.v[i] + w.v[4 * i] * four[0] + w.v[4 * i + 1] * four[1] + w.v[4 * i + 2] * four[2] + w.v[4 * i + 3] * four[3]);
}
#undef TRIMODE_EACH
constexpr bool kBiasInSum = true;
constexpr int kMaxRows = 2;
constexpr int kPanels = 1;

}  // namespace
}  // namespace trimode
