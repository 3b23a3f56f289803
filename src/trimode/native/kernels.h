// What a processor-specific kernel set offers, and the layouts that it agrees on with the rest.
//
// Every kernel gives each row of a product, bit for bit, the same result whatever other rows share the call: integer sums are exact,
// and each output adds its groups (or its inputs) in one fixed order. This is what makes self-speculation exact at any width.
#pragma once
#include <cstddef>
#include <cstdint>

namespace trimode {

constexpr int kLanes = 16;   // outputs of a panel
constexpr int kGroup = 32;   // inputs that share a scale
constexpr int kDepth = 64;       // inputs that a tile of integers takes
constexpr int kWideGroup = 3 * kDepth;  // inputs that share a scale in s8

enum class Format : int { f32 = 0, bf16 = 1, u8 = 2, u4 = 3, s8 = 4 };

constexpr size_t kOnTheWay = 8192;  // bytes of weights, at least: what a core reads while one line comes from memory

// Memory that will be wanted next.
struct Ahead {
  const uint8_t* at = nullptr;
  size_t bytes = 0;
};

// y = W x, W cut into panels of 16 outputs. A panel is
//   f32:  [inputs][16] floats
//   bf16: [inputs / 2][16][2]
//   u8:   [groups][8][16][4] bytes of w / d + 128, then [groups][16] half-precision d
//   u4:   [groups][4][16][4] bytes of two steps of 4 inputs (low nibbles first), then [groups][16] half d, [groups][16] half m: w = d q + m
//   s8:   [steps of 4 inputs][16][4] signed bytes of w / d, then [groups of 192 inputs, the last perhaps shorter][16] half d
// Inputs are padded with zeros to a multiple of 32, in s8 64, outputs to a multiple of 16, panels to 64 bytes.
struct Matrix {
  Format format = Format::f32;
  int num_outputs = 0;
  int num_inputs = 0;
  int padded_inputs = 0;
  int num_panels = 0;
  size_t panel_bytes = 0;
  const uint8_t* data = nullptr;
  int group() const { return format == Format::s8 ? kWideGroup : kGroup; }
  int padding() const { return format == Format::s8 ? kDepth : kGroup; }  // what inputs are padded to a multiple of
  int num_groups() const { return (padded_inputs + group() - 1) / group(); }
  Ahead panels(int from, int to) const { return from < to ? Ahead{data + (size_t)from * panel_bytes, (to - from) * panel_bytes} : Ahead{}; }
};

// How a product rounds its activations. groups: to int8 with a scale for each 32, for u8 and u4. digits: to 14 bits with one scale a row,
// q = 128 high + low, two digits of int8 each, for s8: the products of both are whole numbers, and no input of a group spoils the others.
enum class Rounding { none, groups, digits };

inline Rounding rounding_of(Format f) {
  if (f == Format::f32 || f == Format::bf16) return Rounding::none;
  return f == Format::s8 ? Rounding::digits : Rounding::groups;
}

// What goes with 32 numbers of a row that were rounded together. In one place: what a thread writes lies in few cache lines.
struct RowGroup {
  float scale;
  float sum;      // scale * sum of the group
  int32_t bias;   // -128 * sum of the group
  int32_t unused;
};

// Rows of activations: floats, and the same rounded.
struct Rows {
  const float* values = nullptr;  // [rows][stride]
  size_t stride = 0;
  Rounding rounding = Rounding::none;
  const int8_t* quantized = nullptr;  // [rows][padded_inputs]; digits: [rows][high, low][padded_inputs]
  size_t quantized_stride = 0;
  const RowGroup* groups = nullptr;  // [rows][groups]
  const float* scales = nullptr;     // digits: [rows]
  const int32_t* biases = nullptr;   // digits: [rows][high, low][each 64]
  size_t group_stride = 0;           // from row to row of groups, or of biases
};

struct Output {
  float* values = nullptr;  // [rows][stride]
  size_t stride = 0;
  bool add = false;
  float scale = 1.0f;  // of what is added
};

// T: float, or uint16_t for halves
template <typename T>
struct AttentionTask {
  const float* queries;  // [own inputs] at query_stride, [num_heads][head], already scaled
  size_t query_stride;
  float* out;  // the same at out_stride
  size_t out_stride;
  int num_heads;  // that share keys; row r is head r % num_heads of input r / num_heads
  int first_row, num_rows;
  const T* keys;    // [blocks of 16 positions][head][16]
  const T* values;  // [positions][head padded to 16]
  int head;
  int num_cached;  // positions that every row sees
  int num_own;     // positions after them: the step's own inputs
  const uint8_t* visible;  // [num_own][num_own]; null: causal
  float* scores;   // scratch, [8][num_cached + num_own, padded to 16]
};

struct Kernels {
  const char* name;
  // panels [from, to) of a product; `then`: what may be fetched meanwhile
  void (*multiply)(const Matrix&, int from, int to, const Rows&, int num_rows, const Output&, const Ahead& then);
  void (*quantize)(const float* x, int padded, int8_t* q, RowGroup* groups);
  void (*quantize_digits)(const float* x, int padded, int8_t* q, float* scale, int32_t* biases);
  // out = x / rms(x) * weight; all of `size` floats
  void (*rms_norm)(const float* x, const float* weight, int size, float eps, float* out);
  void (*silu_times)(const float* gate, const float* up, int size, float* out);
  void (*add_to)(float* x, const float* y, int size);
  void (*rotate)(float* x, const float* cosines, const float* sines, int half, float scale);
  void (*store_key_f32)(const float* x, int head, int lane, float* block);  // into a block of 16 positions
  void (*store_key_f16)(const float* x, int head, int lane, uint16_t* block);
  void (*store_value_f32)(const float* x, int head, float* out);
  void (*store_value_f16)(const float* x, int head, uint16_t* out);
  void (*attend_f32)(const AttentionTask<float>&);
  void (*attend_f16)(const AttentionTask<uint16_t>&);
  float (*greatest_but)(const float* x, int size, int but);  // the one at `but` left out
  int (*next_above)(const float* x, int from, int size, float least);  // the first place from `from` on of what is greater; size: none
  float (*sum_exp)(const float* x, int size, float maximum);  // of e^(x - maximum)
};

const Kernels* kernels_amx();
const Kernels* kernels_avx512vnni();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

}  // namespace trimode
