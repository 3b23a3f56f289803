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

enum class Format : int { f32 = 0, bf16 = 1, u8 = 2, u4 = 3 };

// y = W x, W cut into panels of 16 outputs. A panel is
//   f32:  [inputs][16] floats
//   bf16: [inputs / 2][16][2]
//   u8:   [groups][8][16][4] bytes of w / d + 128, then [groups][16] half-precision d
//   u4:   [groups][4][16][4] bytes of two steps of 4 inputs (low nibbles first), then [groups][16] half d, [groups][16] half m: w = d q + m
// Inputs are padded with zeros to a multiple of 32, outputs to a multiple of 16, panels to 64 bytes.
struct Matrix {
  Format format = Format::f32;
  int num_outputs = 0;
  int num_inputs = 0;
  int padded_inputs = 0;
  int num_panels = 0;
  size_t panel_bytes = 0;
  const uint8_t* data = nullptr;
  int num_groups() const { return padded_inputs / kGroup; }
};

// Rows of activations: floats, and the same in int8 with one scale a group.
struct Rows {
  const float* values = nullptr;  // [rows][stride]
  size_t stride = 0;
  const int8_t* quantized = nullptr;  // [rows][padded_inputs]
  size_t quantized_stride = 0;
  const float* scales = nullptr;  // [rows][groups]
  const float* sums = nullptr;    // [rows][groups] scale * sum of the group
  const int32_t* biases = nullptr;  // [rows][groups] -128 * sum of the group
  size_t group_stride = 0;
};

struct Output {
  float* values = nullptr;  // [rows][stride]
  size_t stride = 0;
  const int* rows = nullptr;  // where row r of the inputs goes; null: to row r
  bool add = false;
  float scale = 1.0f;  // of what is added
};

// T: float, or uint16_t for halves
template <typename T>
struct AttentionTask {
  const float* queries;  // [num_rows] at query_stride, already scaled
  size_t query_stride;
  float* out;  // [num_rows] at out_stride
  size_t out_stride;
  int num_rows;
  const T* keys;    // [blocks of 16 positions][head][16]
  const T* values;  // [positions][head padded to 16]
  int head;
  int num_cached;  // positions that every row sees
  int num_own;     // positions after them: the step's own inputs
  int first_row;   // of the rows, among the step's own inputs
  const uint8_t* visible;  // [num_own][num_own]; null: causal
  float* scores;   // scratch, [8][num_cached + num_own, padded to 16]
};

struct Kernels {
  const char* name;
  // panels [from, to) of a product
  void (*multiply)(const Matrix&, int from, int to, const Rows&, int num_rows, const Output&);
  void (*quantize)(const float* x, int padded, int8_t* q, float* scales, float* sums, int32_t* biases);
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
  float (*sum_exp)(const float* x, int size, float maximum);  // of e^(x - maximum)
};

const Kernels* kernels_avx512vnni();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx2();
const Kernels* kernels_portable();

float half_to_float(uint16_t h);
uint16_t float_to_half(float f);

}  // namespace trimode
