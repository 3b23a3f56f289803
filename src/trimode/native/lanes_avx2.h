// Sixteen lanes in two AVX2 registers.
#pragma once
#include <immintrin.h>

namespace trimode {
namespace {

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};
struct Bytes {
  __m256i a, b;
};

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline Floats load_halves(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline void store_halves(uint16_t* p, Floats x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats mul(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats add(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats sub(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats div(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats absolute(Floats x) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats rounded(Floats x) {
  constexpr int how = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(x.a, how), _mm256_round_ps(x.b, how)};
}
inline __m256 power_of_two(__m256 n) {
  // below the smallest normal number the result is 0
  n = _mm256_max_ps(n, _mm256_set1_ps(-127.0f));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline Floats scaled_by_power(Floats x, Floats n) {
  return {_mm256_mul_ps(x.a, power_of_two(n.a)), _mm256_mul_ps(x.b, power_of_two(n.b))};
}
inline float greatest(Floats x) {
  float lanes[16], best;
  store(lanes, x);
  best = lanes[0];
  for (int i = 1; i < 16; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}
inline float sum(Floats x) {
  float lanes[8];
  _mm256_storeu_ps(lanes, _mm256_add_ps(x.a, x.b));
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Ints add(Ints x, Ints y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
inline int32_t sum(Ints x) {
  int32_t lanes[8], total = 0;
  _mm256_storeu_si256((__m256i*)lanes, _mm256_add_epi32(x.a, x.b));
  for (int i = 0; i < 8; ++i) total += lanes[i];
  return total;
}
inline void store_bytes(int8_t* p, Ints x) {
  int32_t lanes[16];
  _mm256_storeu_si256((__m256i*)lanes, x.a);
  _mm256_storeu_si256((__m256i*)(lanes + 8), x.b);
  for (int i = 0; i < 16; ++i) p[i] = (int8_t)lanes[i];
}
inline Floats low_bf16(const uint8_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)p), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_loadu_si256((const __m256i*)(p + 32)), 16))};
}
inline Floats high_bf16(const uint8_t* p) {
  const __m256i high = _mm256_set1_epi32((int)0xffff0000);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)p), high)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_loadu_si256((const __m256i*)(p + 32)), high))};
}
inline Bytes load_bytes(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
inline Bytes flipped(Bytes x) {  // signed to unsigned: + 128
  const __m256i flip = _mm256_set1_epi8((char)0x80);
  return {_mm256_xor_si256(x.a, flip), _mm256_xor_si256(x.b, flip)};
}
inline Bytes low_nibbles(Bytes x) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(x.a, low), _mm256_and_si256(x.b, low)};
}
inline Bytes high_nibbles(Bytes x) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(x.a, 4), low), _mm256_and_si256(_mm256_srli_epi16(x.b, 4), low)};
}
// of 16 groups of 4 unsigned bytes the J-th of each
template <int J>
inline Floats byte_of(Bytes x) {
  const __m256i low = _mm256_set1_epi32(255);
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.a, 8 * J), low)),
          _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(x.b, 8 * J), low))};
}
#ifdef TRIMODE_AVXVNNI
template <bool kIsBiased>
inline Ints dot(Ints acc, Bytes w, int32_t x) {
  const __m256i four = _mm256_set1_epi32(x);
  return {_mm256_dpbusd_avx_epi32(acc.a, w.a, four), _mm256_dpbusd_avx_epi32(acc.b, w.b, four)};
}
constexpr bool kBiasInSum = true;
#else
inline __m256i dot_pairs(__m256i acc, __m256i pairs) {
  return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
template <bool kIsBiased>
inline Ints dot(Ints acc, Bytes w, int32_t x) {
  const __m256i four = _mm256_set1_epi32(x);
  if (!kIsBiased)  // nibbles: 15 * 127 * 2 fits 16 bits
    return {dot_pairs(acc.a, _mm256_maddubs_epi16(w.a, four)), dot_pairs(acc.b, _mm256_maddubs_epi16(w.b, four))};
  // 255 * 127 * 2 would not: |x| times the signed weight with x's sign, 127 * 128 * 2, does
  const __m256i flip = _mm256_set1_epi8((char)0x80), size = _mm256_abs_epi8(four);
  return {dot_pairs(acc.a, _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_xor_si256(w.a, flip), four))),
          dot_pairs(acc.b, _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_xor_si256(w.b, flip), four)))};
}
constexpr bool kBiasInSum = false;
#endif
constexpr int kMaxRows = 3;
constexpr int kPanels = 1;

}  // namespace
}  // namespace trimode
