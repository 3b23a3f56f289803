// The kernels, written once over sixteen lanes. Each processor's source includes this behind its own lanes; everything is in an
// unnamed namespace and no template of the standard library is used, so that no code for a newer processor leaks into shared symbols.

namespace trimode {
namespace {

inline Floats from_memory(const float* p) { return load(p); }
inline Floats from_memory(const uint16_t* p) { return load_halves(p); }
inline void to_memory(float* p, Floats x) { store(p, x); }
inline void to_memory(uint16_t* p, Floats x) { store_halves(p, x); }
inline void put_scalar(float* p, float x) { *p = x; }
inline void put_scalar(uint16_t* p, float x) { *p = float_to_half(x); }

inline int32_t four_bytes(const int8_t* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return x;
}

// e^x: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; 0 far below, about 1e-7 off elsewhere
inline Floats exponential(Floats x) {
  x = min(max(x, all(-200.0f)), all(88.0f));
  const Floats n = rounded(mul(x, all(1.44269504f)));
  Floats r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  Floats p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  return scaled_by_power(add(fma(mul(r, r), p, r), all(1.0f)), n);
}

// ---- products --------------------------------------------------------------------------------------------------------------

inline void put(const Output& out, int row, int panel, Floats value) {
  float* p = out.values + (size_t)row * out.stride + (size_t)panel * kLanes;
  store(p, out.add ? fma(value, all(out.scale), load(p)) : value);
}

// What a block of rows fetches for the panels that come next while it computes. Without it the first block over a panel waits for memory
// and the others leave memory idle. One run of addresses, scales too: the processor's own prefetching follows it.
class Fetching {
 public:
  // block `b` of so many, each of which takes so many steps
  Fetching(const Ahead& next, int b, int num_blocks, int num_steps) {
    const size_t lines = next.bytes / 64, from = lines * b / num_blocks;
    at_ = next.at + from * 64;
    end_ = next.at + lines * (b + 1) / num_blocks * 64;
    each_ = ((size_t)(end_ - at_) / (size_t)num_steps + 63) / 64 * 64;
  }
  void step() {
    for (const uint8_t* to = at_ + each_; at_ < to && at_ < end_; at_ += 64) __builtin_prefetch(at_, 0, 2);
  }

 private:
  const uint8_t *at_, *end_;
  size_t each_;
};

template <int R, int P>
void block_f32(const Matrix& m, int panel, const Rows& x, int row, const Output& out, Fetching fetching) {
  Floats acc[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) acc[p][r] = zero();
  const float* w[P];
  for (int p = 0; p < P; ++p) w[p] = (const float*)(m.data + (size_t)(panel + p) * m.panel_bytes);
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.values + (size_t)(row + r) * x.stride;
  for (int k = 0; k < m.num_inputs; ++k) {
    if (k % kGroup == 0) fetching.step();
    Floats weights[P];
    for (int p = 0; p < P; ++p) weights[p] = load(w[p] + (size_t)k * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats one = all(rows[r][k]);
      for (int p = 0; p < P; ++p) acc[p][r] = fma(weights[p], one, acc[p][r]);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) put(out, row + r, panel + p, acc[p][r]);
}

template <int R, int P>
void block_bf16(const Matrix& m, int panel, const Rows& x, int row, const Output& out, Fetching fetching) {
  Floats acc[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) acc[p][r] = zero();
  const uint8_t* w[P];
  for (int p = 0; p < P; ++p) w[p] = m.data + (size_t)(panel + p) * m.panel_bytes;
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.values + (size_t)(row + r) * x.stride;
  for (int k = 0; k < m.num_inputs; k += 2) {
    if (k % kGroup == 0) fetching.step();
    Floats low[P], high[P];
    for (int p = 0; p < P; ++p) {
      low[p] = low_bf16(w[p] + (size_t)k * 2 * kLanes);
      high[p] = high_bf16(w[p] + (size_t)k * 2 * kLanes);
    }
    for (int r = 0; r < R; ++r) {
      const Floats one = all(rows[r][k]), two = all(rows[r][k + 1]);  // behind the last input the row is 0
      for (int p = 0; p < P; ++p) acc[p][r] = fma(high[p], two, fma(low[p], one, acc[p][r]));
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) put(out, row + r, panel + p, acc[p][r]);
}

template <int R, int P, bool kNibbles>
void block_int(const Matrix& m, int panel, const Rows& x, int row, const Output& out, Fetching fetching) {
  constexpr int kSteps = kGroup / 4;
  constexpr int kGroupBytes = kNibbles ? kGroup * kLanes / 2 : kGroup * kLanes;
  const int groups = m.num_groups();
  Floats acc[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) acc[p][r] = zero();
  const uint8_t* w[P];
  const uint16_t* d[P];
  for (int p = 0; p < P; ++p) {
    w[p] = m.data + (size_t)(panel + p) * m.panel_bytes;
    d[p] = (const uint16_t*)(w[p] + (size_t)groups * kGroupBytes);
  }
  const int8_t* q[R];
  const RowGroup* of_row[R];
  for (int r = 0; r < R; ++r) {
    q[r] = x.quantized + (size_t)(row + r) * x.quantized_stride;
    of_row[r] = x.groups + (size_t)(row + r) * x.group_stride;
  }
  for (int g = 0; g < groups; ++g) {
    fetching.step();
    Ints whole[P][R];
    for (int p = 0; p < P; ++p)
      for (int r = 0; r < R; ++r) whole[p][r] = all_ints(!kNibbles && kBiasInSum ? of_row[r][g].bias : 0);
    for (int s = 0; s < kSteps; s += kNibbles ? 2 : 1) {
      Bytes first[P], second[P];
      for (int p = 0; p < P; ++p) {
        const Bytes packed = load_bytes(w[p] + (size_t)g * kGroupBytes + (size_t)s * 4 * kLanes / (kNibbles ? 2 : 1));
        first[p] = kNibbles ? low_nibbles(packed) : packed;
        if (kNibbles) second[p] = high_nibbles(packed);
      }
      for (int r = 0; r < R; ++r) {
        const int32_t four = four_bytes(q[r] + (size_t)g * kGroup + s * 4);
        for (int p = 0; p < P; ++p) whole[p][r] = dot<!kNibbles>(whole[p][r], first[p], four);
      }
      if (kNibbles)
        for (int r = 0; r < R; ++r) {
          const int32_t four = four_bytes(q[r] + (size_t)g * kGroup + s * 4 + 4);
          for (int p = 0; p < P; ++p) whole[p][r] = dot<!kNibbles>(whole[p][r], second[p], four);
        }
    }
    for (int p = 0; p < P; ++p) {
      const Floats scale = load_halves(d[p] + (size_t)g * kLanes);
      for (int r = 0; r < R; ++r) acc[p][r] = fma(mul(to_floats(whole[p][r]), all(of_row[r][g].scale)), scale, acc[p][r]);
      if (kNibbles) {
        const Floats least = load_halves(d[p] + (size_t)(groups + g) * kLanes);
        for (int r = 0; r < R; ++r) acc[p][r] = fma(least, all(of_row[r][g].sum), acc[p][r]);
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) put(out, row + r, panel + p, acc[p][r]);
}

inline int lesser(int a, int b) { return a < b ? a : b; }

// Signed weights, rows in two digits. What kernels for tiles of integers do in other ways, bit for bit.
template <int R>
void block_digits(const Matrix& m, int panel, const Rows& x, int row, const Output& out) {
  constexpr int kTileBytes = kDepth * kLanes;
  const int tiles = m.padded_inputs / kDepth;
  const uint8_t* w = m.data + (size_t)panel * m.panel_bytes;
  const uint16_t* d = (const uint16_t*)(w + (size_t)tiles * kTileBytes);
  Floats acc[R];
  const int8_t *high[R], *low[R];
  const int32_t* biases[R];
  for (int r = 0; r < R; ++r) {
    acc[r] = zero();
    high[r] = x.quantized + (size_t)(row + r) * x.quantized_stride;
    low[r] = high[r] + x.quantized_stride / 2;
    biases[r] = x.biases + (size_t)(row + r) * x.group_stride;
  }
  for (int g = 0, tile = 0; tile < tiles; ++g) {
    Ints a[R], b[R];
    for (int r = 0; r < R; ++r) a[r] = b[r] = all_ints(0);
    for (const int end = lesser(tiles, tile + kWideGroup / kDepth); tile < end; ++tile) {
      if (kBiasInSum)
        for (int r = 0; r < R; ++r) {
          a[r] = add(a[r], all_ints(biases[r][tile]));
          b[r] = add(b[r], all_ints(biases[r][x.group_stride / 2 + tile]));
        }
      for (int s = 0; s < kDepth / 4; ++s) {
        const Bytes weights = flipped(load_bytes(w + (size_t)tile * kTileBytes + (size_t)s * 4 * kLanes));
        for (int r = 0; r < R; ++r) {
          a[r] = dot<true>(a[r], weights, four_bytes(high[r] + (size_t)tile * kDepth + s * 4));
          b[r] = dot<true>(b[r], weights, four_bytes(low[r] + (size_t)tile * kDepth + s * 4));
        }
      }
    }
    const Floats scale = load_halves(d + (size_t)g * kLanes);
    // both are whole numbers below 2^24, so that this rounds their exact sum once
    for (int r = 0; r < R; ++r) acc[r] = fma(fma(to_floats(a[r]), all(128.0f), to_floats(b[r])), scale, acc[r]);
  }
  for (int r = 0; r < R; ++r) put(out, row + r, panel, mul(acc[r], all(x.scales[row + r])));
}

// four inputs of P panels: weights back to floats, then as in block_f32
template <int R, int P, int J>
inline void add_inputs(Floats (&acc)[P][R], const Bytes (&four)[P], const Floats (&scale)[P], const Floats (&least)[P],
                       const float* const (&rows)[R], size_t k) {
  if constexpr (J < 4) {
    Floats weights[P];
    // exact: the product has at most 19 bits, and the sum is the number that the file means
    for (int p = 0; p < P; ++p) weights[p] = fma(scale[p], byte_of<J>(four[p]), least[p]);
    for (int r = 0; r < R; ++r) {
      const Floats one = all(rows[r][k + J]);
      for (int p = 0; p < P; ++p) acc[p][r] = fma(weights[p], one, acc[p][r]);
    }
    add_inputs<R, P, J + 1>(acc, four, scale, least, rows, k);
  }
}

// weights of few bits, activations in float32: the very numbers, and a fifth of the bytes to read
template <int R, int P, Format kFormat>
void block_widened(const Matrix& m, int panel, const Rows& x, int row, const Output& out, Fetching fetching) {
  constexpr bool kNibbles = kFormat == Format::u4;
  constexpr int kInputs = kFormat == Format::s8 ? kWideGroup : kGroup;
  constexpr int kGroupBytes = kInputs * kLanes / (kNibbles ? 2 : 1);
  const int groups = m.num_groups();
  Floats acc[P][R];
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) acc[p][r] = zero();
  const float* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = x.values + (size_t)(row + r) * x.stride;
  for (int g = 0; g < groups; ++g) {
    fetching.step();
    Floats scale[P], least[P];
    const uint8_t* w[P];
    for (int p = 0; p < P; ++p) {
      const uint8_t* begin = m.data + (size_t)(panel + p) * m.panel_bytes;
      const uint16_t* d = (const uint16_t*)(begin + (size_t)m.padded_inputs * kLanes / (kNibbles ? 2 : 1));
      w[p] = begin + (size_t)g * kGroupBytes;
      scale[p] = load_halves(d + (size_t)g * kLanes);
      least[p] = kNibbles ? load_halves(d + (size_t)(groups + g) * kLanes) : mul(scale[p], all(-128.0f));
    }
    const int steps = lesser(kInputs, m.padded_inputs - g * kInputs) / 4;
    for (int s = 0; s < steps; s += kNibbles ? 2 : 1) {
      Bytes first[P], second[P];
      for (int p = 0; p < P; ++p) {
        const Bytes packed = load_bytes(w[p] + (size_t)s * 4 * kLanes / (kNibbles ? 2 : 1));
        first[p] = kNibbles ? low_nibbles(packed) : kFormat == Format::s8 ? flipped(packed) : packed;
        if (kNibbles) second[p] = high_nibbles(packed);
      }
      add_inputs<R, P, 0>(acc, first, scale, least, rows, (size_t)g * kInputs + s * 4);
      if constexpr (kNibbles) add_inputs<R, P, 0>(acc, second, scale, least, rows, (size_t)g * kInputs + s * 4 + 4);
    }
  }
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) put(out, row + r, panel + p, acc[p][r]);
}

template <int R, int P>
void block_of(const Matrix& m, int panel, const Rows& x, int row, const Output& out, const Fetching& fetching) {
  switch (m.format) {
    case Format::f32: return block_f32<R, P>(m, panel, x, row, out, fetching);
    case Format::bf16: return block_bf16<R, P>(m, panel, x, row, out, fetching);
    case Format::u8:
      if (x.rounding == Rounding::none) return block_widened<R, P, Format::u8>(m, panel, x, row, out, fetching);
      return block_int<R, P, false>(m, panel, x, row, out, fetching);
    case Format::u4:
      if (x.rounding == Rounding::none) return block_widened<R, P, Format::u4>(m, panel, x, row, out, fetching);
      return block_int<R, P, true>(m, panel, x, row, out, fetching);
    case Format::s8:
      if (x.rounding == Rounding::none) return block_widened<R, P, Format::s8>(m, panel, x, row, out, fetching);
      for (int p = 0; p < P; ++p) block_digits<R>(m, panel + p, x, row, out);
  }
}

template <int P>
void panels_of(const Matrix& m, int panel, const Rows& x, int num_rows, const Output& out, const Ahead& next) {
  const int num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  int row = 0;
  for (int b = 0; b < num_blocks; ++b) {
    const int rows = (num_rows - row) / (num_blocks - b);  // blocks as equal as can be
    const Fetching fetching(next, b, num_blocks, m.num_groups());
    if (rows == 1) block_of<1, P>(m, panel, x, row, out, fetching);
    if (rows == 2) block_of<2, P>(m, panel, x, row, out, fetching);
    if constexpr (kMaxRows >= 3)
      if (rows == 3) block_of<3, P>(m, panel, x, row, out, fetching);
    if constexpr (kMaxRows >= 6) {
      if (rows == 4) block_of<4, P>(m, panel, x, row, out, fetching);
      if (rows == 5) block_of<5, P>(m, panel, x, row, out, fetching);
      if (rows == 6) block_of<6, P>(m, panel, x, row, out, fetching);
    }
    row += rows;
  }
}

#ifdef TRIMODE_TILES
}  // namespace
}  // namespace trimode
#include "tiles_amx.h"
namespace trimode {
namespace {
#endif

void multiply(const Matrix& m, int from, int to, const Rows& x, int num_rows, const Output& out, const Ahead& then) {
#ifdef TRIMODE_TILES
  if (m.format == Format::s8 && x.rounding == Rounding::digits) return multiply_tiles(m, from, to, x, num_rows, out);
#endif
  const int distance = kPanels * (1 + (int)(kOnTheWay / (kPanels * m.panel_bytes)));  // many of small panels
  Ahead behind = then;
  const auto next = [&](int panel) {
    if (panel + distance < to) return m.panels(panel + distance, lesser(to, panel + distance + kPanels));
    const Ahead rest = behind;
    behind = {};
    return rest;
  };
  int panel = from;
  for (; panel + kPanels <= to; panel += kPanels) panels_of<kPanels>(m, panel, x, num_rows, out, next(panel));
  for (; panel < to; ++panel) panels_of<1>(m, panel, x, num_rows, out, next(panel));
}

// ---- rows ------------------------------------------------------------------------------------------------------------------

void quantize(const float* x, int padded, int8_t* q, RowGroup* groups) {
  for (int g = 0; g < padded / kGroup; ++g) {
    const Floats a = load(x + g * kGroup), b = load(x + g * kGroup + kLanes);
    const float most = greatest(max(absolute(a), absolute(b)));
    const Floats inverse = all(most > 0.0f ? 127.0f / most : 0.0f);
    const Ints qa = to_ints(mul(a, inverse)), qb = to_ints(mul(b, inverse));
    store_bytes(q + g * kGroup, qa);
    store_bytes(q + g * kGroup + kLanes, qb);
    const int32_t total = sum(add(qa, qb));
    const float scale = most / 127.0f;
    groups[g] = {scale, scale * (float)total, -128 * total, 0};
  }
}

void quantize_digits(const float* x, int padded, int8_t* q, float* scale, int32_t* biases) {
  Floats lanes = zero();
  for (int k = 0; k < padded; k += kLanes) lanes = max(lanes, absolute(load(x + k)));
  const float most = greatest(lanes);
  const Floats inverse = all(most > 0.0f ? 16256.0f / most : 0.0f);
  for (int tile = 0; tile < padded / kDepth; ++tile) {
    Ints highs = all_ints(0), lows = all_ints(0);
    for (int k = tile * kDepth; k < (tile + 1) * kDepth; k += kLanes) {
      const Floats whole = rounded(mul(load(x + k), inverse)), high = rounded(mul(whole, all(1.0f / 128.0f)));
      const Ints a = to_ints(high), b = to_ints(sub(whole, mul(high, all(128.0f))));
      store_bytes(q + k, a);
      store_bytes(q + padded + k, b);
      highs = add(highs, a);
      lows = add(lows, b);
    }
    biases[tile] = -128 * sum(highs);
    biases[padded / kDepth + tile] = -128 * sum(lows);
  }
  *scale = most / 16256.0f;
}

void rms_norm(const float* x, const float* weight, int size, float eps, float* out) {
  Floats squares = zero();
  for (int i = 0; i < size; i += kLanes) {
    const Floats v = load(x + i);
    squares = fma(v, v, squares);
  }
  const Floats scale = all(1.0f / __builtin_sqrtf(sum(squares) / (float)size + eps));
  for (int i = 0; i < size; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
}

inline Floats silu(Floats x) { return div(x, add(all(1.0f), exponential(sub(zero(), x)))); }

void silu_times(const float* gate, const float* up, int size, float* out) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, mul(silu(load(gate + i)), load(up + i)));
  if (i < size) {
    float g[kLanes] = {}, u[kLanes] = {}, o[kLanes];
    __builtin_memcpy(g, gate + i, (size_t)(size - i) * 4);
    __builtin_memcpy(u, up + i, (size_t)(size - i) * 4);
    store(o, mul(silu(load(g)), load(u)));
    __builtin_memcpy(out + i, o, (size_t)(size - i) * 4);
  }
}

void add_to(float* x, const float* y, int size) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store(x + i, add(load(x + i), load(y + i)));
  for (; i < size; ++i) x[i] += y[i];
}

void rotate(float* x, const float* cosines, const float* sines, int half, float scale) {
  int i = 0;
  const Floats by = all(scale);
  for (; i + kLanes <= half; i += kLanes) {
    const Floats a = load(x + i), b = load(x + half + i), c = load(cosines + i), s = load(sines + i);
    store(x + i, mul(sub(mul(a, c), mul(b, s)), by));
    store(x + half + i, mul(add(mul(b, c), mul(a, s)), by));
  }
  for (; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = (a * cosines[i] - b * sines[i]) * scale;
    x[half + i] = (b * cosines[i] + a * sines[i]) * scale;
  }
}

// ---- attention -------------------------------------------------------------------------------------------------------------

template <typename T>
void store_key(const float* x, int head, int lane, T* block) {
  int i = 0;
  for (; i + kLanes <= head; i += kLanes) {
    T lanes[kLanes];
    to_memory(lanes, load(x + i));
    for (int j = 0; j < kLanes; ++j) block[(size_t)(i + j) * kLanes + lane] = lanes[j];
  }
  for (; i < head; ++i) put_scalar(block + (size_t)i * kLanes + lane, x[i]);
}

template <typename T>
void store_value(const float* x, int head, T* out) {
  int i = 0;
  for (; i + kLanes <= head; i += kLanes) to_memory(out + i, load(x + i));
  for (; i < head; ++i) put_scalar(out + i, x[i]);
}

inline int padded_to_lanes(int n) { return (n + kLanes - 1) / kLanes * kLanes; }

// scores of R rows against B blocks of 16 positions, one chain of additions a lane over the head: chains enough to keep multipliers busy
template <int R, int B, typename T>
void score_blocks(const AttentionTask<T>& t, const float* const (&queries)[R], int block, int stride) {
  Floats acc[B][R];
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) acc[b][r] = zero();
  const T* keys = t.keys + (size_t)block * t.head * kLanes;
  for (int i = 0; i < t.head; ++i) {
    Floats k[B];
    for (int b = 0; b < B; ++b) k[b] = from_memory(keys + ((size_t)b * t.head + i) * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats q = all(queries[r][i]);
      for (int b = 0; b < B; ++b) acc[b][r] = fma(q, k[b], acc[b][r]);
    }
  }
  for (int b = 0; b < B; ++b)
    for (int r = 0; r < R; ++r) store(t.scores + (size_t)r * stride + (block + b) * kLanes, acc[b][r]);
}

template <int R, int C, typename T>
void weigh_values(const AttentionTask<T>& t, float* const (&outs)[R], int column, int num_positions, int stride, const float* totals) {
  Floats acc[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) acc[r][c] = zero();
  const int head_stride = padded_to_lanes(t.head);
  const T* values = t.values + column;
  for (int i = 0; i < num_positions; ++i) {
    Floats v[C];
    for (int c = 0; c < C; ++c) v[c] = from_memory(values + (size_t)i * head_stride + c * kLanes);
    for (int r = 0; r < R; ++r) {
      const Floats weight = all(t.scores[(size_t)r * stride + i]);
      for (int c = 0; c < C; ++c) acc[r][c] = fma(weight, v[c], acc[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) {
      float lanes[kLanes];
      store(lanes, div(acc[r][c], all(totals[r])));
      const int left = t.head - column - c * kLanes;
      __builtin_memcpy(outs[r] + column + c * kLanes, lanes,
                       (size_t)(left < kLanes ? left : kLanes) * 4);
    }
}

template <int R, typename T>
void attend_rows(const AttentionTask<T>& t, int row) {
  const int last = (row + R - 1) / t.num_heads;
  const int num_positions = t.num_cached + (t.visible ? t.num_own : last + 1);
  const int num_blocks = (num_positions + kLanes - 1) / kLanes;
  const int stride = num_blocks * kLanes;
  const float* queries[R];
  float* outs[R];
  int inputs[R];
  for (int r = 0; r < R; ++r) {
    inputs[r] = (row + r) / t.num_heads;
    const size_t column = (size_t)((row + r) % t.num_heads) * t.head;
    queries[r] = t.queries + inputs[r] * t.query_stride + column;
    outs[r] = t.out + inputs[r] * t.out_stride + column;
  }
  constexpr int kBlocks = R > 4 ? 1 : R > 1 ? 2 * kPanels : 4;
  int block = 0;
  for (; block + kBlocks <= num_blocks; block += kBlocks) score_blocks<R, kBlocks>(t, queries, block, stride);
  for (; block < num_blocks; ++block) score_blocks<R, 1>(t, queries, block, stride);
  float totals[R];
  for (int r = 0; r < R; ++r) {
    float* scores = t.scores + (size_t)r * stride;
    const int own = inputs[r];
    for (int i = t.num_cached; i < stride; ++i) {
      const int key = i - t.num_cached;
      const bool sees = key < t.num_own && (t.visible ? t.visible[(size_t)own * t.num_own + key] != 0 : key <= own);
      if (!sees) scores[i] = -__builtin_inff();
    }
    Floats most = load(scores);
    for (int b = 1; b < num_blocks; ++b) most = max(most, load(scores + b * kLanes));
    const Floats maximum = all(greatest(most));
    Floats total = zero();
    for (int b = 0; b < num_blocks; ++b) {
      const Floats e = exponential(sub(load(scores + b * kLanes), maximum));
      total = add(total, e);
      store(scores + b * kLanes, e);
    }
    totals[r] = sum(total);
  }
  int column = 0;
  constexpr int kColumns = R > 4 ? 2 : 4;  // as many sums as stay in registers
  for (; column + kColumns * kLanes <= padded_to_lanes(t.head); column += kColumns * kLanes)
    weigh_values<R, kColumns>(t, outs, column, num_positions, stride, totals);
  for (; column < t.head; column += kLanes) weigh_values<R, 1>(t, outs, column, num_positions, stride, totals);
}

template <typename T>
void attend(const AttentionTask<T>& t) {
  int row = t.first_row;
  const int end = row + t.num_rows;
  if constexpr (kMaxRows >= 6)
    for (; row + 8 <= end; row += 8) attend_rows<8>(t, row);
  for (; row + 4 <= end; row += 4) attend_rows<4>(t, row);
  switch (end - row) {
    case 3: attend_rows<3>(t, row); break;
    case 2: attend_rows<2>(t, row); break;
    case 1: attend_rows<1>(t, row); break;
  }
}

// ---- choices ---------------------------------------------------------------------------------------------------------------

float greatest_but(const float* x, int size, int but) {
  float most = -__builtin_inff();
  int i = 0;
  Floats lanes = all(most);
  for (; i + kLanes <= size; i += kLanes) {
    if (but >= i && but < i + kLanes) {
      for (int j = i; j < i + kLanes; ++j)
        if (j != but && x[j] > most) most = x[j];
    } else {
      lanes = max(lanes, load(x + i));
    }
  }
  for (; i < size; ++i)
    if (i != but && x[i] > most) most = x[i];
  const float other = greatest(lanes);
  return other > most ? other : most;
}

int next_above(const float* x, int from, int size, float least) {
  constexpr int kStride = 4 * kLanes;
  int i = from;
  for (; i + kStride <= size; i += kStride) {
    const Floats most = max(max(load(x + i), load(x + i + kLanes)), max(load(x + i + 2 * kLanes), load(x + i + 3 * kLanes)));
    if (greatest(most) > least) break;
  }
  for (; i < size; ++i)
    if (x[i] > least) return i;
  return size;
}

float sum_exp(const float* x, int size, float maximum) {
  const Floats most = all(maximum);
  Floats total = zero();
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) total = add(total, exponential(sub(load(x + i), most)));
  if (i < size) {
    float lanes[kLanes];
    for (int j = 0; j < kLanes; ++j) lanes[j] = i + j < size ? x[i + j] : -__builtin_inff();
    total = add(total, exponential(sub(load(lanes), most)));
  }
  return sum(total);
}

const Kernels kKernels = {
    TRIMODE_NAME,       multiply,          quantize,           quantize_digits,      rms_norm,          silu_times,
    add_to,             rotate,             store_key<float>,  store_key<uint16_t>, store_value<float>,  store_value<uint16_t>,
    attend<float>,      attend<uint16_t>,  greatest_but,       next_above,          sum_exp,
};

}  // namespace
}  // namespace trimode
