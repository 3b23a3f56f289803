// Products of s8 weights by tiles of integers (AMX): 16 outputs and the digits of 8 rows at once, the same bits as block_digits.
#pragma once

namespace trimode {
namespace {

struct TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

constexpr int kAheadBytes = 4096;  // what is fetched while a group is computed lies so far on

inline void fetch(const uint8_t* p, int bytes) {
  for (int line = 0; line < bytes; line += 64) __builtin_prefetch(p + line, 0, 3);
}

// rows [row, row + R) of one panel, of which `num` exist: a tile holds both digits of up to 8
template <int R>
inline void block_tiles(const Matrix& m, int panel, const Rows& x, int row, int num, bool is_first, const Output& out) {
  constexpr int kTileBytes = kDepth * kLanes;
  constexpr int kTiles = (R + 7) / 8;
  const int tiles = m.padded_inputs / kDepth, groups = m.num_groups();
  const uint8_t* w = m.data + (size_t)panel * m.panel_bytes;
  const uint16_t* d = (const uint16_t*)(w + (size_t)tiles * kTileBytes);
  const int8_t* q = x.quantized + (size_t)row * x.quantized_stride;
  const size_t stride = x.quantized_stride / 2;  // high and low digits of a row follow one another
  alignas(64) int32_t sums[2][kTiles * 16 * kLanes];
  Floats acc[R];
  for (int r = 0; r < R; ++r) acc[r] = zero();
  for (int g = 0, tile = 0; g <= groups; ++g) {
    if (g < groups) {
      _tile_zero(0);
      if constexpr (kTiles == 2) _tile_zero(1);
      for (const int end = lesser(tiles, tile + kWideGroup / kDepth); tile < end; ++tile) {
        const uint8_t* weights = w + (size_t)tile * kTileBytes;
        if (is_first) fetch(weights + kAheadBytes, kTileBytes);
        _tile_loadd(4, weights, 4 * kLanes);
        _tile_loadd(2, q + (size_t)tile * kDepth, stride);
        _tile_dpbssd(0, 2, 4);
        if constexpr (kTiles == 2) {
          _tile_loadd(3, q + 8 * x.quantized_stride + (size_t)tile * kDepth, stride);
          _tile_dpbssd(1, 3, 4);
        }
      }
    }
    if (g > 0) {  // the sums of the group before, while the tiles are busy
      const Floats scale = load_halves(d + (size_t)(g - 1) * kLanes);
      const int32_t* both = sums[(g - 1) & 1];
      for (int r = 0; r < R; ++r) {
        const __m512i high = _mm512_load_si512(both + 2 * r * kLanes), low = _mm512_load_si512(both + (2 * r + 1) * kLanes);
        acc[r] = fma(to_floats({_mm512_add_epi32(_mm512_slli_epi32(high, 7), low)}), scale, acc[r]);
      }
    }
    if (g < groups) {
      _tile_stored(0, sums[g & 1], 4 * kLanes);
      if constexpr (kTiles == 2) _tile_stored(1, sums[g & 1] + 16 * kLanes, 4 * kLanes);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
    if (r < num) put(out, row + r, panel, mul(acc[r], all(x.scales[row + r])));
}

// Rows behind the last are read, up to a multiple of 8, and what comes of them is dropped.
void multiply_tiles(const Matrix& m, int from, int to, const Rows& x, int num_rows, const Output& out) {
  TileSizes sizes;
  const uint8_t tile_rows = num_rows > 4 ? 16 : num_rows > 2 ? 8 : num_rows > 1 ? 4 : 2;
  for (int t = 0; t < 4; ++t) sizes.rows[t] = tile_rows, sizes.bytes[t] = 64;
  sizes.rows[4] = 16, sizes.bytes[4] = 64;
  _tile_loadconfig(&sizes);
  for (int panel = from; panel < to; ++panel)
    for (int row = 0; row < num_rows; row += 16) {
      const int left = num_rows - row;
      if (left > 8)
        block_tiles<16>(m, panel, x, row, left, row == 0, out);
      else if (left > 4 || tile_rows == 16)
        block_tiles<8>(m, panel, x, row, left, row == 0, out);
      else if (left > 2)
        block_tiles<4>(m, panel, x, row, left, true, out);
      else if (left > 1)
        block_tiles<2>(m, panel, x, row, left, true, out);
      else
        block_tiles<1>(m, panel, x, row, left, true, out);
    }
  _tile_release();
}

}  // namespace
}  // namespace trimode
