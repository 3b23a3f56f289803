// Sixteen lanes in one AVX-512 register.
#pragma once
#include <immintrin.h>

namespace trimode {
namespace {

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};
struct Bytes {
  __m512i v;
};

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats x) { _mm512_storeu_ps(p, x.v); }
inline Floats load_halves(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline void store_halves(uint16_t* p, Floats x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats mul(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats add(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats sub(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats div(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats rounded(Floats a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// 2^n for whole n
inline Floats scaled_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline float greatest(Floats a) { return _mm512_reduce_max_ps(a.v); }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline Ints all_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline void store_bytes(int8_t* p, Ints a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(a.v)); }
// the low and the high bfloat16 of 16 pairs
inline Floats low_bf16(const uint8_t* p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16))}; }
inline Floats high_bf16(const uint8_t* p) {
  return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), _mm512_set1_epi32((int)0xffff0000)))};
}
inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Bytes flipped(Bytes b) { return {_mm512_xor_si512(b.v, _mm512_set1_epi8((char)0x80))}; }  // signed to unsigned: + 128
inline Bytes low_nibbles(Bytes b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
inline Bytes high_nibbles(Bytes b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
// of 16 groups of 4 unsigned bytes the J-th of each
template <int J>
inline Floats byte_of(Bytes b) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(b.v, 8 * J), _mm512_set1_epi32(255)))};
}
// acc + the dot products of 16 groups of 4 unsigned bytes with the same 4 signed ones
template <bool kIsBiased>
inline Ints dot(Ints acc, Bytes w, int32_t x) {
  return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))};
}
constexpr bool kBiasInSum = true;  // of unsigned bytes w + 128, the 128 is in the sum and must be taken out
constexpr int kMaxRows = 6;
constexpr int kPanels = 2;

}  // namespace
}  // namespace trimode
