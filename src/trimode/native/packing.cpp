// Weights into panels and back.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "model.h"

namespace trimode {

float half_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  uint32_t bits;
  if (exponent == 31) {
    bits = sign | 0x7f800000 | fraction << 13;
  } else if (exponent != 0) {
    bits = sign | (exponent + 112) << 23 | fraction << 13;
  } else {
    const float value = std::ldexp((float)fraction, -24);
    return sign ? -value : value;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000);
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return sign | 0x7e00;
  if (bits >= 0x477ff000) return sign | 0x7c00;  // rounds to beyond the largest
  if (bits < 0x38800000) {                       // subnormal
    float size;
    std::memcpy(&size, &bits, 4);
    return sign | (uint16_t)std::nearbyint(std::ldexp(size, 24));
  }
  bits += 0xfff + ((bits >> 13) & 1);
  return sign | (uint16_t)((bits - 0x38000000) >> 13);
}

Block::Block(size_t bytes) : bytes_(bytes) {
  // calloc gives untouched pages, which no zeroing of our own would
  void* raw = std::calloc(bytes + 64, 1);
  if (raw == nullptr) throw std::bad_alloc();
  owner_ = std::shared_ptr<void>(raw, std::free);
  data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(raw) + 63) / 64 * 64);
}

namespace {

// of a panel's weights, before their scales
size_t weight_bytes(const Matrix& m) { return (size_t)m.padded_inputs * kLanes / (m.format == Format::u4 ? 2 : 1); }

uint8_t* panel_of(Weights& w, int row) { return w.own.data() + (size_t)(row / kLanes) * w.matrix.panel_bytes; }

// where a value of a row lies in its panel: [steps of 4 inputs][16 lanes][4]
size_t place_of(int lane, int input) { return (size_t)(input / 4) * 4 * kLanes + (size_t)lane * 4 + input % 4; }

void put_byte(const Matrix& m, uint8_t* panel, int lane, int input, uint8_t value) {
  if (m.format != Format::u4) {
    panel[place_of(lane, input)] = m.format == Format::s8 ? value ^ 128 : value;
    return;
  }
  // two steps of four inputs share their bytes
  const int step = input / 4;
  uint8_t& both = panel[(size_t)(step / 2) * 4 * kLanes + (size_t)lane * 4 + input % 4];
  both = step % 2 ? (uint8_t)((both & 15) | value << 4) : (uint8_t)((both & 240) | value);
}

uint8_t byte_at(const Matrix& m, const uint8_t* panel, int lane, int input) {
  if (m.format == Format::u8) return panel[place_of(lane, input)];
  if (m.format == Format::s8) return panel[place_of(lane, input)] ^ 128;
  const int step = input / 4;
  const uint8_t both = panel[(size_t)(step / 2) * 4 * kLanes + (size_t)lane * 4 + input % 4];
  return step % 2 ? both >> 4 : both & 15;
}

uint16_t* scales_of(const Matrix& m, uint8_t* panel) {
  return reinterpret_cast<uint16_t*>(panel + weight_bytes(m));
}

}  // namespace

Matrix shape_of(Format format, int num_outputs, int num_inputs) {
  Matrix m;
  m.format = format;
  m.num_outputs = num_outputs;
  m.num_inputs = num_inputs;
  m.padded_inputs = round_up(num_inputs, m.padding());
  m.num_panels = round_up(num_outputs, kLanes) / kLanes;
  const size_t groups = (size_t)m.num_groups();
  switch (format) {
    case Format::f32: m.panel_bytes = (size_t)m.padded_inputs * kLanes * 4; break;
    case Format::bf16: m.panel_bytes = (size_t)m.padded_inputs * kLanes * 2; break;
    case Format::u8:
    case Format::s8: m.panel_bytes = weight_bytes(m) + groups * 2 * kLanes; break;
    case Format::u4: m.panel_bytes = weight_bytes(m) + groups * 4 * kLanes; break;
  }
  m.panel_bytes = (m.panel_bytes + 63) / 64 * 64;
  return m;
}

Weights make_weights(Format format, int num_outputs, int num_inputs) {
  Weights w;
  w.matrix = shape_of(format, num_outputs, num_inputs);
  w.own = Block(w.matrix.panel_bytes * w.matrix.num_panels);
  w.matrix.data = w.own.data();
  if (format == Format::u8)  // a padded input is a zero, not -128 times a scale
    for (int p = 0; p < w.matrix.num_panels; ++p)
      std::memset(w.own.data() + (size_t)p * w.matrix.panel_bytes, 128, weight_bytes(w.matrix));
  return w;
}

void pack_floats(Weights& w, int first, int count, const float* rows) {
  const Matrix& m = w.matrix;
  for (int i = 0; i < count; ++i) {
    const float* row = rows + (size_t)i * m.num_inputs;
    const int lane = (first + i) % kLanes;
    uint8_t* panel = panel_of(w, first + i);
    if (m.format == Format::f32) {
      float* out = reinterpret_cast<float*>(panel);
      for (int k = 0; k < m.num_inputs; ++k) out[(size_t)k * kLanes + lane] = row[k];
    } else if (m.format == Format::bf16) {
      uint16_t* out = reinterpret_cast<uint16_t*>(panel);
      for (int k = 0; k < m.num_inputs; ++k) {
        uint32_t bits;
        std::memcpy(&bits, row + k, 4);
        const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
        const uint32_t rounded = is_nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
        out[(size_t)(k / 2) * 2 * kLanes + (size_t)lane * 2 + k % 2] = (uint16_t)(rounded >> 16);
      }
    } else {
      uint16_t* scales = scales_of(m, panel);
      for (int g = 0; g < m.num_groups(); ++g) {
        const int from = g * m.group(), to = std::min(from + m.group(), m.num_inputs);
        if (m.format == Format::u4) {  // as GGUF's Q4_1
          float lowest = row[from], highest = row[from];
          for (int k = from; k < to; ++k) lowest = std::min(lowest, row[k]), highest = std::max(highest, row[k]);
          const uint16_t d = float_to_half(std::min((highest - lowest) / 15.0f, 65504.0f)), least = float_to_half(lowest);
          scales[(size_t)g * kLanes + lane] = d;
          scales[(size_t)(m.num_groups() + g) * kLanes + lane] = least;
          const float scale = half_to_float(d), begin = half_to_float(least);
          for (int k = from; k < to; ++k) {
            const float q = scale > 0.0f ? std::nearbyint((row[k] - begin) / scale) : 0.0f;
            put_byte(m, panel, lane, k, (uint8_t)std::max(0.0f, std::min(15.0f, q)));
          }
          continue;
        }
        float most = 0.0f;
        for (int k = from; k < to; ++k) most = std::max(most, std::fabs(row[k]));
        const uint16_t d = float_to_half(std::min(most / 127.0f, 65504.0f));
        const float scale = half_to_float(d);
        scales[(size_t)g * kLanes + lane] = d;
        for (int k = from; k < to; ++k) {
          const float q = scale > 0.0f ? std::nearbyint(row[k] / scale) : 0.0f;
          put_byte(m, panel, lane, k, (uint8_t)(128 + (int)std::max(-127.0f, std::min(127.0f, q))));
        }
      }
    }
  }
}

size_t row_bytes(Blocks encoding, int num_inputs) {
  const size_t block = encoding == Blocks::q8_0 ? 2 + kGroup : (encoding == Blocks::q4_1 ? 4 : 2) + kGroup / 2;
  return num_inputs / kGroup * block;
}

namespace {

// 32 numbers of GGUF's
void unpack_block(Blocks encoding, const uint8_t* raw, float* out) {
  uint16_t d, least;
  std::memcpy(&d, raw, 2);
  std::memcpy(&least, raw + 2, 2);
  const float scale = half_to_float(d);
  if (encoding == Blocks::q8_0) {
    for (int k = 0; k < kGroup; ++k) out[k] = scale * (float)(int8_t)raw[2 + k];
    return;
  }
  const bool has_least = encoding == Blocks::q4_1;
  const float m = has_least ? half_to_float(least) : -8.0f * scale;
  const uint8_t* q = raw + (has_least ? 4 : 2);
  for (int k = 0; k < kGroup / 2; ++k) {
    out[k] = scale * (float)(q[k] & 15) + m;
    out[kGroup / 2 + k] = scale * (float)(q[k] >> 4) + m;
  }
}

}  // namespace

void pack_blocks(Weights& w, Blocks encoding, const std::vector<int>& order, const uint8_t* raw) {
  const Matrix& m = w.matrix;
  const int groups = m.num_inputs / kGroup;
  const int head = encoding == Blocks::q4_1 ? 4 : 2;  // bytes of scales before the values
  const size_t block_bytes = head + (encoding == Blocks::q8_0 ? kGroup : kGroup / 2);
  if (m.format == Format::s8) {
    std::vector<float> values(m.num_inputs);
    for (int row : order) {
      for (int g = 0; g < groups; ++g, raw += block_bytes) unpack_block(encoding, raw, &values[(size_t)g * kGroup]);
      pack_floats(w, row, 1, values.data());
    }
    return;
  }
  for (int row : order) {
    const int lane = row % kLanes;
    uint8_t* panel = panel_of(w, row);
    uint16_t* scales = scales_of(m, panel);
    for (int g = 0; g < groups; ++g, raw += block_bytes) {
      uint16_t d, least;
      std::memcpy(&d, raw, 2);
      scales[(size_t)g * kLanes + lane] = d;
      if (encoding == Blocks::q8_0) {
        for (int k = 0; k < kGroup; ++k) put_byte(m, panel, lane, g * kGroup + k, (uint8_t)(raw[head + k] ^ 128));
        continue;
      }
      if (encoding == Blocks::q4_1)
        std::memcpy(&least, raw + 2, 2);
      else
        least = float_to_half(-8.0f * half_to_float(d));
      scales[(size_t)(m.num_groups() + g) * kLanes + lane] = least;
      for (int k = 0; k < kGroup / 2; ++k) {
        put_byte(m, panel, lane, g * kGroup + k, raw[head + k] & 15);
        put_byte(m, panel, lane, g * kGroup + kGroup / 2 + k, raw[head + k] >> 4);
      }
    }
  }
}

void unpack_row(const Matrix& m, int row, float* out) {
  const int lane = row % kLanes;
  const uint8_t* panel = m.data + (size_t)(row / kLanes) * m.panel_bytes;
  if (m.format == Format::f32) {
    const float* from = reinterpret_cast<const float*>(panel);
    for (int k = 0; k < m.num_inputs; ++k) out[k] = from[(size_t)k * kLanes + lane];
  } else if (m.format == Format::bf16) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(panel);
    for (int k = 0; k < m.num_inputs; ++k) {
      const uint32_t bits = (uint32_t)from[(size_t)(k / 2) * 2 * kLanes + (size_t)lane * 2 + k % 2] << 16;
      std::memcpy(out + k, &bits, 4);
    }
  } else {
    const uint16_t* scales = scales_of(m, const_cast<uint8_t*>(panel));
    for (int g = 0; g < m.num_groups(); ++g) {
      const float d = half_to_float(scales[(size_t)g * kLanes + lane]);
      const float least = m.format == Format::u4 ? half_to_float(scales[(size_t)(m.num_groups() + g) * kLanes + lane]) : -128.0f * d;
      for (int k = g * m.group(); k < std::min((g + 1) * m.group(), m.num_inputs); ++k) out[k] = d * byte_at(m, panel, lane, k) + least;
    }
  }
}

}  // namespace trimode
