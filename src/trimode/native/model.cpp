#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace trimode {
namespace {

constexpr int kRowsOfTask = 8;     // queries of heads that share their keys, in one attention task
constexpr int kHeadPanels = 64;    // panels of the output head that are looked at together: 1,024 logits a row lie in the first cache
constexpr int kAheadPanels = 2;    // of the next piece of a product that are fetched at this one's end
constexpr int kTile = 192;         // rows that stay near while the panels pass

}  // namespace

// ---- cache -----------------------------------------------------------------------------------------------------------------

Cache::Cache(const Config& c, int num_positions, bool is_half)
    : num_layers_(c.num_layers),
      num_heads_(c.num_kv_heads),
      head_size_(c.head_size),
      value_size_(round_up(c.head_size, kLanes)),
      num_positions_(round_up(num_positions, kLanes)),
      is_half_(is_half),
      keys_((size_t)num_layers_ * num_heads_ * num_positions_ * head_size_ * (is_half ? 2 : 4)),
      values_((size_t)num_layers_ * num_heads_ * num_positions_ * value_size_ * (is_half ? 2 : 4)) {}

void Cache::copy(int source, int target, int count) {
  if (is_half_)
    copy_as<uint16_t>(source, target, count);
  else
    copy_as<float>(source, target, count);
}

template <typename T>
void Cache::copy_as(int source, int target, int count) {
  // slots begin at blocks of 16 positions, so whole blocks move; what is behind `count` in the last one is nobody's
  const size_t block = (size_t)kLanes * head_size_;
  for (int layer = 0; layer < num_layers_; ++layer)
    for (int head = 0; head < num_heads_; ++head) {
      T* k = keys<T>(layer, head);
      std::memmove(k + target / kLanes * block, k + source / kLanes * block, (size_t)round_up(count, kLanes) / kLanes * block * sizeof(T));
      T* v = values<T>(layer, head);
      std::memmove(v + (size_t)target * value_size_, v + (size_t)source * value_size_, (size_t)count * value_size_ * sizeof(T));
    }
}

// ---- room ------------------------------------------------------------------------------------------------------------------

void Model::Floats2d::reserve(int rows, int columns) {
  // behind the last column zeros: products read whole groups. They stay zero, since nobody writes there anything else.
  stride = (size_t)round_up(columns, kDepth);
  // Behind the last row: what the alignment takes, and what an adapter's last panel reaches beyond it.
  const size_t needed = (size_t)rows * stride + 32;
  if (memory.size() < needed) memory.assign(needed, 0.0f);
  values = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

Model::Model(Config c, int num_threads, const Kernels* k)
    : config(std::move(c)), kernels(k), layers(config.num_layers), threads_(num_threads), scratch_(threads_.count()) {}

void Model::reserve(int n) {
  const Config& c = config;
  const int q = c.num_heads * c.head_size, kv = c.num_kv_heads * c.head_size;
  x_.reserve(n, c.width);
  normed_.reserve(n, c.width);
  qkv_.reserve(n, q + 2 * kv);
  attended_.reserve(n, q);
  gate_up_.reserve(n, 2 * c.mlp_width);
  gated_.reserve(n, c.mlp_width);
  slots_.resize(n);
}

void Model::each_row(int num_rows, int num_floats, const std::function<void(int)>& work) {
  // waking nobody: a hand-over costs about what 2,000 numbers cost
  if ((size_t)num_rows * num_floats < 8192) {
    for (int r = 0; r < num_rows; ++r) work(r);
    return;
  }
  const int rows = std::max(1, std::min(16, num_rows / (2 * threads_.count())));
  threads_.run((num_rows + rows - 1) / rows, [&](int chunk, int) {
    for (int r = chunk * rows; r < std::min(num_rows, (chunk + 1) * rows); ++r) work(r);
  });
}

Rows Model::prepare(Floats2d& x, int num_rows, int num_inputs, Rounding rounding, Prepared& room, const Fill& fill) {
  Rows rows;
  rows.values = x.values;
  rows.stride = x.stride;
  rows.rounding = rounding;
  if (rounding == Rounding::none) {
    if (fill.work) each_row(num_rows, fill.cost, fill.work);
    return rows;
  }
  const bool digits = rounding == Rounding::digits;
  const int group = digits ? kDepth : kGroup, padded = round_up(num_inputs, group), groups = padded / group;
  rows.quantized_stride = (size_t)padded * (digits ? 2 : 1);
  rows.group_stride = (size_t)groups * (digits ? 2 : 1);
  rows.scale_stride = digits ? 1 : (size_t)groups;
  // tiles read 8 rows at a time
  room.memory.resize(std::max(room.memory.size(), (size_t)round_up(num_rows, 8) * rows.quantized_stride + 64));
  room.scales.resize(std::max(room.scales.size(), (size_t)num_rows * groups));
  room.sums.resize(room.scales.size());
  room.biases.resize(std::max(room.biases.size(), (size_t)num_rows * rows.group_stride));
  room.quantized = room.memory.data();
  each_row(num_rows, padded + fill.cost, [&](int r) {
    if (fill.work) fill.work(r);  // beside its rounding: a row is in the first cache, and one hand-over does for both
    int8_t* q = room.quantized + (size_t)r * rows.quantized_stride;
    int32_t* biases = &room.biases[(size_t)r * rows.group_stride];
    const size_t g = (size_t)r * groups;
    if (digits)
      kernels->quantize_digits(x.row(r), padded, q, &room.scales[r], biases);
    else
      kernels->quantize(x.row(r), padded, q, &room.scales[g], &room.sums[g], biases);
  });
  rows.quantized = room.quantized;
  rows.scales = room.scales.data();
  rows.sums = room.sums.data();
  rows.biases = room.biases.data();
  return rows;
}

namespace {

Rows from_row(Rows x, int row) {
  x.values += (size_t)row * x.stride;
  if (x.rounding == Rounding::none) return x;
  x.quantized += (size_t)row * x.quantized_stride;
  x.scales += (size_t)row * x.scale_stride;
  if (x.rounding == Rounding::groups) x.sums += (size_t)row * x.group_stride;
  x.biases += (size_t)row * x.group_stride;
  return x;
}

Rows from_column(Rows x, int column) {  // a multiple of what inputs are padded to
  x.values += column;
  if (x.rounding == Rounding::none) return x;
  x.quantized += column;
  if (x.rounding == Rounding::digits) {
    x.biases += column / kDepth;
    return x;
  }
  x.scales += column / kGroup;
  x.sums += column / kGroup;
  x.biases += column / kGroup;
  return x;
}

// Rows that another core wrote take their time: all of them are sent for at once.
void fetch(const Rows& x, int num_rows) {
  if (x.rounding == Rounding::none) return;
  const auto lines = [num_rows](const auto* begin, size_t stride) {
    const char* const first = (const char*)begin;
    for (const char* line = first; line < first + num_rows * stride * sizeof(*begin); line += 64) __builtin_prefetch(line, 0, 3);
  };
  lines(x.quantized, x.quantized_stride);
  lines(x.scales, x.scale_stride);
  if (x.rounding == Rounding::groups) lines(x.sums, x.group_stride);
  lines(x.biases, x.group_stride);
}

Ahead ahead(const Matrix& m, int panel) { return m.panels(panel, std::min(m.num_panels, panel + kAheadPanels)); }

Output to_row(Output out, int row) {
  if (out.rows)
    out.rows += row;
  else
    out.values += (size_t)row * out.stride;
  return out;
}

}  // namespace

void Model::multiply(const std::vector<Product>& products, const Matrix& following) {
  // panels of all of them in one hand-over; small pieces, so that a thread that comes late leaves the others little to wait for
  int total = 0, most_rows = 0;
  for (const Product& p : products) {
    total += p.weights->matrix.num_panels;
    most_rows = std::max(most_rows, p.num_rows);
  }
  const int panels = std::max(2, round_up(threads_.count() == 1 ? total : total / (threads_.count() * 6), 2));
  pieces_.clear();
  for (const Product& p : products)
    for (int from = 0; from < p.weights->matrix.num_panels; from += panels)
      pieces_.push_back({&p, from, std::min(p.weights->matrix.num_panels, from + panels)});
  const int num_pieces = (int)pieces_.size();
  for (int row = 0; row < most_rows; row += kTile)
    threads_.run(num_pieces, [&](int i, int thread) {
      const auto [p, from, to] = pieces_[i];
      const int rows = std::min(kTile, p->num_rows - row);
      if (rows <= 0) return;
      const Rows x = from_row(p->rows, row);
      if (i == threads_.first_of(num_pieces, thread)) fetch(x, rows);
      // behind a thread's last piece: what falls to it of the product after this one
      const bool is_last = i + 1 == num_pieces || i + 1 == threads_.first_of(num_pieces, thread + 1);
      const Ahead then = is_last ? ahead(following, threads_.first_of(following.num_panels, thread))
                                 : ahead(pieces_[i + 1].product->weights->matrix, pieces_[i + 1].from);
      kernels->multiply(p->weights->matrix, from, to, x, rows, to_row(p->out, row), then);
    });
}

void Model::apply(Layer& layer, Place place, Floats2d& x, int num_rows, int num_inputs, Floats2d& y, bool add,
                  const std::vector<int>& adapted, const Matrix& following, const Fill& fill) {
  const Weights& w = layer.maps[place];
  const AdapterGroup& group = layer.adapters[place];
  const bool adapts = !adapted.empty() && group.a.is_set();
  const int n = (int)adapted.size(), rank = adapts ? group.a.matrix.num_outputs : 0;
  // where most rows are adapted, A takes all of them beside the base: one hand-over less, and no copy of the inputs
  const bool together = adapts && 2 * n > num_rows && rounding(w) == rounding(group.a);
  const Rows rows = prepare(x, num_rows, num_inputs, rounding(w), prepared_, fill);
  const Product base{&w, rows, num_rows, {y.values, y.stride, nullptr, add, 1.0f}};
  if (together) {
    low_.reserve(num_rows, rank);
    multiply({base, {&group.a, rows, num_rows, {low_.values, low_.stride, nullptr, false, 1.0f}}}, following);
    if (n < num_rows)
      for (int i = 0; i < n; ++i) std::memmove(low_.row(i), low_.row(adapted[i]), low_.stride * 4);  // adapted[i] >= i
  } else {
    multiply({base}, following);
  }
  const std::vector<float>& bias = layer.biases[place];
  if (!bias.empty())
    each_row(num_rows, (int)bias.size(), [&](int r) { kernels->add_to(y.row(r), bias.data(), (int)bias.size()); });
  if (!adapts) return;
  if (!together) {
    picked_.reserve(n, num_inputs);
    for (int i = 0; i < n; ++i) std::memcpy(picked_.row(i), x.row(adapted[i]), picked_.stride * 4);
    low_.reserve(n, rank);
    multiply({{&group.a, prepare(picked_, n, num_inputs, rounding(group.a), prepared_picked_, {}), n,
               {low_.values, low_.stride, nullptr, false, 1.0f}}}, following);
  }
  const Rows low = prepare(low_, n, rank, rounding(group.parts[0].b), prepared_low_, {});
  std::vector<Product> parts;
  for (const AdapterPart& part : group.parts) {
    parts.push_back({&part.b, from_column(low, part.column), n,
                     {y.values + part.output, y.stride, adapted.data(), true, adapter_scale}});
    // panels that reach into the next part's outputs add zeros there: not while others add to them
    if (part.b.matrix.num_outputs % kLanes != 0) {
      multiply(parts, following);
      parts.clear();
    }
  }
  if (!parts.empty()) multiply(parts, following);
}

// ---- one forward -----------------------------------------------------------------------------------------------------------

void Model::grow_rotations(int position) {
  if (position < num_rotations_) return;
  const int half = (int)config.frequencies.size();
  const int wanted = std::max(position + 1, num_rotations_ + 256);
  cosines_.resize((size_t)wanted * half);
  sines_.resize((size_t)wanted * half);
  query_scales_.resize(wanted);
  for (int p = num_rotations_; p < wanted; ++p) {
    for (int i = 0; i < half; ++i) {
      const float phase = (float)p * config.frequencies[i];
      cosines_[(size_t)p * half + i] = std::cos(phase) * config.rope_scale;
      sines_[(size_t)p * half + i] = std::sin(phase) * config.rope_scale;
    }
    float scale = 1.0f / std::sqrt((float)config.head_size);
    if (config.llama4_beta != 0.0f)
      scale *= 1.0f + config.llama4_beta * std::log1p(std::floor((float)p / (float)config.original_positions));
    query_scales_[p] = scale;
  }
  num_rotations_ = wanted;
}

void Model::rotate_and_store(Layer& layer, int index, const int* positions, int num_inputs, Cache& cache) {
  const int H = config.num_heads, G = config.num_kv_heads, K = config.head_size, half = K / 2;
  each_row(num_inputs, (H + 2 * G) * K, [&](int i) {
    float* row = qkv_.row(i);
    const float* cosines = &cosines_[(size_t)positions[i] * half];
    const float* sines = &sines_[(size_t)positions[i] * half];
    for (int h = 0; h < H + G; ++h) {
      const std::vector<float>& norm = h < H ? layer.q_norm : layer.k_norm;
      float* head = row + (size_t)h * K;
      if (!norm.empty()) {
        float squares = 0.0f;
        for (int k = 0; k < K; ++k) squares += head[k] * head[k];
        const float scale = 1.0f / std::sqrt(squares / (float)K + config.norm_eps);
        for (int k = 0; k < K; ++k) head[k] = head[k] * scale * norm[k];
      }
      kernels->rotate(head, cosines, sines, half, h < H ? query_scales_[positions[i]] : 1.0f);
    }
    const int slot = slots_[i];
    for (int g = 0; g < G; ++g) {
      const float* key = row + (size_t)(H + g) * K;
      const float* value = row + (size_t)(H + G + g) * K;
      if (cache.is_half()) {
        kernels->store_key_f16(key, K, slot % kLanes, cache.keys<uint16_t>(index, g) + (size_t)(slot / kLanes) * kLanes * K);
        kernels->store_value_f16(value, K, cache.values<uint16_t>(index, g) + (size_t)slot * cache.value_size());
      } else {
        kernels->store_key_f32(key, K, slot % kLanes, cache.keys<float>(index, g) + (size_t)(slot / kLanes) * kLanes * K);
        kernels->store_value_f32(value, K, cache.values<float>(index, g) + (size_t)slot * cache.value_size());
      }
    }
  });
}

template <typename T>
void Model::attend(int index, Cache& cache, const std::vector<Span>& spans) {
  const int H = config.num_heads, K = config.head_size, shared = H / config.num_kv_heads;
  struct Piece {
    const Span* span;
    int group, row;  // of the heads that share keys; of inputs times these heads
  };
  std::vector<Piece> pieces;
  size_t most = 0;
  for (const Span& s : spans) {
    most = std::max(most, (size_t)round_up(s.cached + s.length, kLanes));
    for (int g = 0; g < config.num_kv_heads; ++g)
      for (int row = 0; row < s.length * shared; row += kRowsOfTask) pieces.push_back({&s, g, row});
  }
  for (std::vector<float>& scores : scratch_)  // here, where no memory is an error that can be told
    if (scores.size() < 8 * most) scores.resize(8 * most);
  const auto work = [&](int i, int thread) {
    const auto [span, group, row] = pieces[i];
    std::vector<float>& scores = scratch_[thread];
    AttentionTask<T> task;
    task.queries = qkv_.row(span->start) + (size_t)group * shared * K;
    task.query_stride = qkv_.stride;
    task.out = attended_.row(span->start) + (size_t)group * shared * K;
    task.out_stride = attended_.stride;
    task.num_heads = shared;
    task.num_rows = std::min(kRowsOfTask, span->length * shared - row);
    task.keys = cache.keys<T>(index, group) + (size_t)span->first_position * K;
    task.values = cache.values<T>(index, group) + (size_t)span->first_position * cache.value_size();
    task.head = K;
    task.num_cached = span->cached;
    task.num_own = span->length;
    task.first_row = row;
    task.visible = span->visible;
    task.scores = scores.data();
    if constexpr (std::is_same_v<T, float>)
      kernels->attend_f32(task);
    else
      kernels->attend_f16(task);
  };
  threads_.run((int)pieces.size(), work);
}

void Model::run(const int* tokens, const int* positions, int n, const std::vector<Span>& spans, Cache& cache,
                const std::vector<int>& adapted, const std::vector<int>& asked, float* hidden) {
  const int D = config.width, I = config.mlp_width, q = config.num_heads * config.head_size;
  const Threads::Awake awake(threads_);
  reserve(n);
  for (int i = 0; i < n; ++i) {
    grow_rotations(positions[i]);
    unpack_row(embedding.matrix, tokens[i], x_.row(i));
  }
  if (!mask_embedding.empty())
    for (int i : adapted) std::memcpy(x_.row(i), mask_embedding.data(), (size_t)D * 4);
  for (const Span& s : spans)
    for (int i = 0; i < s.length; ++i) slots_[s.start + i] = s.first_position + s.cached + i;
  const auto normalized = [&](const std::vector<float>& weight) {
    return Fill{D, [&, w = weight.data()](int r) { kernels->rms_norm(x_.row(r), w, D, config.norm_eps, normed_.row(r)); }};
  };
  // an exponential costs about four times a plain number
  const Fill gated{4 * I, [&](int r) { kernels->silu_times(gate_up_.row(r), gate_up_.row(r) + I, I, gated_.row(r)); }};
  for (int index = 0; index < config.num_layers; ++index) {
    Layer& layer = layers[index];
    const bool is_last = index + 1 == config.num_layers;
    const Matrix* const then[kPlaces] = {&layer.maps[kOutput].matrix, &layer.maps[kGateUp].matrix, &layer.maps[kDown].matrix,
                                         is_last ? &head_weights().matrix : &layers[index + 1].maps[kQkv].matrix};
    apply(layer, kQkv, normed_, n, D, qkv_, false, adapted, *then[kQkv], normalized(layer.attention_norm));
    rotate_and_store(layer, index, positions, n, cache);
    if (cache.is_half())
      attend<uint16_t>(index, cache, spans);
    else
      attend<float>(index, cache, spans);
    apply(layer, kOutput, attended_, n, q, x_, true, adapted, *then[kOutput], {});
    apply(layer, kGateUp, normed_, n, D, gate_up_, false, adapted, *then[kGateUp], normalized(layer.mlp_norm));
    apply(layer, kDown, gated_, n, I, x_, true, adapted, *then[kDown], gated);
  }
  final_.reserve(1, D);
  for (size_t i = 0; i < asked.size(); ++i) {
    kernels->rms_norm(x_.row(asked[i]), norm.data(), D, config.norm_eps, final_.row(0));
    std::memcpy(hidden + i * D, final_.row(0), (size_t)D * 4);
  }
}

void Model::head(const float* hidden, int count, int but, float* logits, size_t stride, int* best, float* logsumexp) {
  const Weights& w = head_weights();
  const Matrix& m = w.matrix;
  const Threads::Awake awake(threads_);
  final_.reserve(count, config.width);
  for (int r = 0; r < count; ++r) std::memcpy(final_.row(r), hidden + (size_t)r * config.width, (size_t)config.width * 4);
  const Rows x = prepare(final_, count, config.width, rounding(w), prepared_final_, {});
  const int num_chunks = (m.num_panels + kHeadPanels - 1) / kHeadPanels;
  struct Best {
    float value, maximum, sum;
  };
  std::vector<Best> found((size_t)num_chunks * count);
  threads_.run(num_chunks, [&](int chunk, int) {
    const int from = chunk * kHeadPanels, to = std::min(m.num_panels, from + kHeadPanels);
    kernels->multiply(m, from, to, x, count, {logits, stride, nullptr, false, 1.0f}, ahead(m, to));
    const int begin = from * kLanes, size = std::min(m.num_outputs, to * kLanes) - begin;
    for (int r = 0; r < count; ++r) {
      Best& b = found[(size_t)chunk * count + r];
      const float* row = logits + (size_t)r * stride + begin;
      b.value = kernels->greatest_but(row, size, but - begin);
      b.maximum = but >= begin && but < begin + size ? std::max(b.value, row[but - begin]) : b.value;
      b.sum = kernels->sum_exp(row, size, b.maximum);
    }
  });
  for (int r = 0; r < count; ++r) {
    // in order of the chunks, so that the sum is the same whatever else is in the forward, and the first of equals wins
    int first = 0;
    float maximum = found[r].maximum;
    for (int c = 1; c < num_chunks; ++c) {
      const Best& b = found[(size_t)c * count + r];
      maximum = std::max(maximum, b.maximum);
      if (b.value > found[(size_t)first * count + r].value) first = c;
    }
    double sum = 0.0;
    for (int c = 0; c < num_chunks; ++c) {
      const Best& b = found[(size_t)c * count + r];
      sum += (double)b.sum * std::exp((double)b.maximum - maximum);
    }
    logsumexp[r] = (float)(maximum + std::log(sum));
    const float* row = logits + (size_t)r * stride;
    const float value = found[(size_t)first * count + r].value;
    best[r] = 0;  // where nothing is a number
    for (int i = first * kHeadPanels * kLanes; i < m.num_outputs; ++i)
      if (row[i] == value && i != but) {
        best[r] = i;
        break;
      }
  }
}

}  // namespace trimode
