#include "model.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace trimode {
namespace {

constexpr int kRowsOfTask = 8;     // queries of heads that share their keys, at most, in one attention task
constexpr int kTasksOfThread = 3;  // of attention, at least, as far as there are queries
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

void Model::Room::reserve(int rows, int columns) {
  // behind the last column zeros: products read whole groups. They stay zero, since nobody writes there anything else.
  stride = (size_t)round_up(columns, kDepth);
  // Behind the last row: what the alignment takes, and what an adapter's last panel reaches beyond it.
  const size_t needed = (size_t)rows * stride + 32;
  if (memory.size() < needed) memory.assign(needed, 0.0f);
  values = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

Model::Model(Config c, int num_threads, const Kernels* k)
    : config(std::move(c)), kernels(k), layers(config.num_layers), threads_(num_threads), scratch_(threads_.count()) {
  const int H = config.num_heads, G = config.num_kv_heads, K = config.head_size, I = config.mlp_width;
  if (K % kLanes == 0) {  // heads that attend together lie together: most often the thread that makes them is the one that reads them
    const int size = K / kLanes;
    for (int g = 0; g < G; ++g) {
      for (int h = g * (H / G); h < (g + 1) * (H / G); ++h) jobs_[kQkv].push_back({{h * size, (h + 1) * size}});
      for (int h : {H + g, H + G + g}) jobs_[kQkv].push_back({{h * size, (h + 1) * size}});
    }
    turns_in_job_ = true;
  } else {
    jobs_[kQkv] = split((H + 2 * G) * K);
  }
  gates_in_job_ = I % kGroup == 0;
  jobs_[kGateUp] = split(gates_in_job_ ? I : 2 * I);
  if (gates_in_job_)
    for (Job& job : jobs_[kGateUp]) job.also = {job.own.from + I / kLanes, job.own.to + I / kLanes};
  jobs_[kOutput] = jobs_[kDown] = split(config.width);
}

// Small jobs, so that a thread that comes late leaves the others little to wait for; of whole groups; as many panels for each thread.
std::vector<Model::Job> Model::split(int num_outputs) const {
  const int total = round_up(num_outputs, kLanes) / kLanes, pairs = (total + 1) / 2;
  const int num = std::min(pairs, threads_.count() * 6);
  std::vector<Job> jobs;
  for (int i = 0; i < num; ++i)
    jobs.push_back({{(int)((int64_t)pairs * i / num) * 2, std::min(total, (int)((int64_t)pairs * (i + 1) / num) * 2)}});
  return jobs;
}

const std::vector<Model::Job>& Model::low_jobs(Place place, const Matrix& a) {
  std::vector<Job>& jobs = low_jobs_[place];
  if (jobs.empty() || jobs.back().own.to != a.num_panels) jobs = split(a.num_outputs);
  return jobs;
}

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

Rows Model::rows_of(const Floats2d& x, int num_rows, int num_inputs, Rounding rounding, Prepared& room) {
  Rows rows;
  rows.values = x.values;
  rows.stride = x.stride;
  rows.rounding = rounding;
  if (rounding == Rounding::none) return rows;
  const bool digits = rounding == Rounding::digits;
  const int group = digits ? kDepth : kGroup, padded = round_up(num_inputs, group), groups = padded / group;
  const auto grow = [](auto& values, size_t size) { values.resize(std::max(values.size(), size)); };
  rows.quantized_stride = (size_t)padded * (digits ? 2 : 1);
  rows.group_stride = (size_t)groups * (digits ? 2 : 1);
  // tiles read 8 rows at a time, from any row on
  grow(room.quantized, (size_t)(num_rows + 7) * rows.quantized_stride + 64);
  if (digits) {
    grow(room.scales, num_rows);
    grow(room.biases, (size_t)num_rows * rows.group_stride);
  } else {
    grow(room.groups, (size_t)num_rows * groups);
  }
  rows.quantized = room.quantized.data();
  rows.groups = room.groups.data();
  rows.scales = room.scales.data();
  rows.biases = room.biases.data();
  return rows;
}

void Model::round_groups(const Rows& rows, Prepared& room, int row, int from, int to) {
  kernels->quantize(rows.values + (size_t)row * rows.stride + from, to - from, &room.quantized[(size_t)row * rows.quantized_stride + from],
                    &room.groups[(size_t)row * rows.group_stride + from / kGroup]);
}

Rows Model::prepare(const Floats2d& x, int num_rows, int num_inputs, Rounding rounding, Prepared& room, const Fill& fill) {
  const Rows rows = rows_of(x, num_rows, num_inputs, rounding, room);
  if (rounding == Rounding::none) {
    if (fill.work) each_row(num_rows, fill.cost, fill.work);
    return rows;
  }
  const bool digits = rounding == Rounding::digits;
  const int padded = round_up(num_inputs, digits ? kDepth : kGroup);
  each_row(num_rows, padded + fill.cost, [&](int r) {
    if (fill.work) fill.work(r);  // beside its rounding: a row is in the first cache, and one hand-over does for both
    if (digits)
      kernels->quantize_digits(rows.values + (size_t)r * rows.stride, padded, &room.quantized[(size_t)r * rows.quantized_stride],
                               &room.scales[r], &room.biases[(size_t)r * rows.group_stride]);
    else
      round_groups(rows, room, r, 0, padded);
  });
  return rows;
}

namespace {

Rows from_row(Rows x, int row) {
  x.values += (size_t)row * x.stride;
  if (x.rounding == Rounding::none) return x;
  x.quantized += (size_t)row * x.quantized_stride;
  if (x.rounding == Rounding::groups) {
    x.groups += (size_t)row * x.group_stride;
    return x;
  }
  x.scales += row;
  x.biases += (size_t)row * x.group_stride;
  return x;
}

Rows from_column(Rows x, int column) {  // a multiple of what inputs are padded to
  x.values += column;
  if (x.rounding == Rounding::none) return x;
  x.quantized += column;
  if (x.rounding == Rounding::groups)
    x.groups += column / kGroup;
  else
    x.biases += column / kDepth;
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
  if (x.rounding == Rounding::groups)
    lines(x.groups, x.group_stride);
  else
    lines(x.biases, x.group_stride);
}

Ahead ahead(const Matrix& m, int panel) {
  return m.panels(panel, std::min(m.num_panels, panel + std::max(kAheadPanels, (int)(kOnTheWay / m.panel_bytes))));
}

}  // namespace

// A hand-over of one or two products. What a thread must know for it lies in this one place, which is sent for as a whole; only where
// an adapter acts on several runs of inputs are there terms elsewhere.
struct Model::Multiplying {
  Model* model;
  Next following;
  int num_products, num_jobs;
  Product products[2];

  struct Chunk {
    const Product* product;
    int job;
  };
  // Each thread takes its share of every product's jobs, the first product's first: the same jobs again where another product has as many.
  Chunk chunk(int i) const {
    if (num_products == 1) return {&products[0], i};
    const Threads& threads = model->threads_;
    for (int thread = 0; thread < threads.count(); ++thread)
      for (const Product& p : products) {
        const int from = threads.first_of(p.num_jobs, thread), count = threads.first_of(p.num_jobs, thread + 1) - from;
        if (i < count) return {&p, from + i};
        i -= count;
      }
    return {&products[0], 0};  // never: there are as many as all jobs
  }

  Ahead first_panels(int thread) const {
    const Threads& threads = model->threads_;
    const int first = following.jobs ? following.jobs[threads.first_of(following.num_jobs, thread)].own.from
                                     : threads.first_of(following.matrix->num_panels, thread);
    return ahead(*following.matrix, first);
  }

  void operator()(int i, int thread) const {
    const auto [p, index] = chunk(i);
    const Job& job = p->jobs[index];
    if (i == model->threads_.first_of(num_jobs, thread)) fetch(p->terms()[0].x, std::min(kTile, p->terms()[0].count));
    struct Piece {
      const Term* term;
      int from, to, row, end;
    } piece{nullptr, 0, 0, 0, 0};
    // one piece behind, so that it knows what comes next
    const auto compute = [&, p = p](const Ahead& then) {
      if (piece.term == nullptr) return;
      const Term& t = *piece.term;
      model->kernels->multiply(*t.matrix, piece.from, piece.to, from_row(t.x, piece.row - t.first), piece.end - piece.row,
                               {p->y.row(piece.row) + t.output, p->y.stride, t.add, t.scale}, then);
    };
    for (int row = 0; row < p->num_rows; row += kTile) {
      const int end = std::min(p->num_rows, row + kTile);
      for (const Term* t = p->terms(); t < p->terms() + p->num_terms; ++t)
        for (const Panels& range : {job.own, job.also}) {
          const int first = t->output / kLanes;
          const Piece next{t, std::max(range.from - first, 0), std::min(range.to - first, t->matrix->num_panels), std::max(row, t->first),
                           std::min(end, t->first + t->count)};
          if (next.from >= next.to || next.row >= next.end) continue;
          compute(ahead(*t->matrix, next.from));
          piece = next;
        }
      // behind a thread's last job: what falls to it of the product after this one
      if (i + 1 == num_jobs || i + 1 == model->threads_.first_of(num_jobs, thread + 1)) {
        compute(first_panels(thread));
      } else {
        const auto [product, after] = chunk(i + 1);
        compute(ahead(*product->terms()[0].matrix, product->jobs[after].own.from));
      }
      piece.term = nullptr;
      model->finish(p->finish, p->y, job, row, end);
    }
  }
};

void Model::multiply(const Product& first, const Product* second, const Next& following) {
  Multiplying work{this, following, second ? 2 : 1, first.num_jobs + (second ? second->num_jobs : 0), {first, second ? *second : Product{}}};
  threads_.run(work.num_jobs, work);
}

void Model::finish(const Finish& f, const Floats2d& y, const Job& job, int row, int end) {
  if (f.bias != nullptr)
    for (const Panels& range : {job.own, job.also}) {
      const int from = range.from * kLanes, to = std::min(f.num_biases, range.to * kLanes);
      for (int r = row; from < to && r < end; ++r) kernels->add_to(y.row(r) + from, f.bias + from, to - from);
    }
  const int from = job.own.from * kLanes, to = job.own.to * kLanes;
  const bool rounds = f.rounded.rounding == Rounding::groups;
  for (int r = row; r < end && (f.kind != Finish::nothing || rounds); ++r) {
    if (f.kind == Finish::turn) turn(f, r, from / config.head_size);
    if (f.kind == Finish::gate) gate(r, from, to);
    if (rounds) round_groups(f.rounded, *f.room, r, from, to);
  }
}

void Model::apply(const Layer& layer, Place place, const Rows& x, const Floats2d& floats, int num_rows, const Floats2d& y, bool add,
                  Finish finish, const Next& following) {
  const Weights& w = layer.maps[place];
  const AdapterGroup& group = layer.adapters[place];
  const std::vector<Job>& jobs = jobs_[place];
  if (!layer.biases[place].empty()) finish.bias = layer.biases[place].data(), finish.num_biases = (int)layer.biases[place].size();
  Product base{jobs.data(), (int)jobs.size(), y, num_rows, finish};
  base.put({&w.matrix, x, 0, num_rows, 0, add, 1.0f});
  if (!is_adapted(layer, place)) return multiply(base, nullptr, following);

  // beside the base the adapter's A, then what its B add to that
  const Matrix& a = group.a.matrix;
  const int rank = a.num_outputs;
  low_.reserve(num_adapted_, rank);
  Rows low = rows_of(low_, num_adapted_, rank, rounding(group.parts[0].b), prepared_low_);
  const bool rounds = low.rounding == Rounding::groups;
  const Rows own = rounding(w) == rounding(group.a) ? x : prepare(floats, num_rows, a.num_inputs, rounding(group.a), prepared_other_, {});
  const std::vector<Job>& own_jobs = low_jobs(place, a);
  Product to_low{own_jobs.data(), (int)own_jobs.size(), low_, num_adapted_, {}};
  if (rounds) to_low.finish.rounded = low, to_low.finish.room = &prepared_low_;
  int num = 0;
  for (const Run& run : runs_) {
    to_low.put({&a, from_row(own, run.first), num, run.count, 0, false, 1.0f});
    num += run.count;
  }
  base.finish = {};
  multiply(to_low, &base, {&group.parts[0].b.matrix, jobs.data(), (int)jobs.size()});
  if (!rounds) low = prepare(low_, num_adapted_, rank, low.rounding, prepared_low_, {});
  bool is_aligned = true;
  for (const AdapterPart& part : group.parts) is_aligned = is_aligned && part.output % kLanes == 0;
  // else a panel that reaches into the next part's outputs adds zeros there: one thread does them all
  const Job whole{{0, w.matrix.num_panels + 1}};
  Product add_up{is_aligned ? jobs.data() : &whole, is_aligned ? (int)jobs.size() : 1, y, num_rows, finish};
  for (const AdapterPart& part : group.parts) {
    num = 0;
    for (const Run& run : runs_) {
      add_up.put({&part.b.matrix, from_row(from_column(low, part.column), num), run.first, run.count, part.output, true, adapter_scale});
      num += run.count;
    }
  }
  multiply(add_up, nullptr, following);
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

void Model::turn(const Finish& f, int input, int head) {
  const int H = config.num_heads, G = config.num_kv_heads, K = config.head_size, half = K / 2, index = f.index, position = f.positions[input];
  const Cache& cache = *f.cache;
  float* const own = qkv_.row(input) + (size_t)head * K;
  const int slot = slots_[input];
  if (head >= H + G) {
    const int g = head - H - G;
    if (cache.is_half())
      kernels->store_value_f16(own, K, cache.values<uint16_t>(index, g) + (size_t)slot * cache.value_size());
    else
      kernels->store_value_f32(own, K, cache.values<float>(index, g) + (size_t)slot * cache.value_size());
    return;
  }
  const std::vector<float>& norm = head < H ? f.layer->q_norm : f.layer->k_norm;
  if (!norm.empty()) {
    float squares = 0.0f;
    for (int k = 0; k < K; ++k) squares += own[k] * own[k];
    const float scale = 1.0f / std::sqrt(squares / (float)K + config.norm_eps);
    for (int k = 0; k < K; ++k) own[k] = own[k] * scale * norm[k];
  }
  kernels->rotate(own, &cosines_[(size_t)position * half], &sines_[(size_t)position * half], half,
                  head < H ? query_scales_[position] : 1.0f);
  if (head < H) return;
  const size_t block = (size_t)(slot / kLanes) * kLanes * K;
  if (cache.is_half())
    kernels->store_key_f16(own, K, slot % kLanes, cache.keys<uint16_t>(index, head - H) + block);
  else
    kernels->store_key_f32(own, K, slot % kLanes, cache.keys<float>(index, head - H) + block);
}

void Model::gate(int row, int from, int to) {
  kernels->silu_times(gate_up_.row(row) + from, gate_up_.row(row) + config.mlp_width + from, to - from, gated_.row(row) + from);
}

void Model::share_attention(const std::vector<Span>& spans) {
  const int shared = config.num_heads / config.num_kv_heads;
  size_t most = 0, total = 0;
  for (const Span& s : spans) total += (size_t)s.length * config.num_heads;
  // very few queries are shared out evenly, though keys are then read again
  const int evenly = (int)(total / (threads_.count() * kTasksOfThread)), wanted = 2 * evenly < kRowsOfTask ? std::max(1, evenly) : kRowsOfTask;
  queries_.clear();
  for (const Span& s : spans) {
    most = std::max(most, (size_t)round_up(s.cached + s.length, kLanes));
    for (int g = 0; g < config.num_kv_heads; ++g)
      for (int row = 0; row < s.length * shared; row += wanted) queries_.push_back({s, g, row, std::min(s.length * shared, row + wanted)});
  }
  for (std::vector<float>& scores : scratch_)  // here, where no memory is an error that can be told
    scores.resize(std::max(scores.size(), kRowsOfTask * most));
}

template <typename T>
void Model::attend(int index, const Cache& cache, const Rows& rounded) {
  struct Attending {
    Model* model;
    int index;
    const Cache* cache;
    Rows rounded;

    void operator()(int i, int thread) const {
      const auto& [span, group, row, end] = model->queries_[i];
      const int K = model->config.head_size, shared = model->config.num_heads / model->config.num_kv_heads;
      AttentionTask<T> task;
      task.queries = model->qkv_.row(span.start) + (size_t)group * shared * K;
      task.query_stride = model->qkv_.stride;
      task.out = model->attended_.row(span.start) + (size_t)group * shared * K;
      task.out_stride = model->attended_.stride;
      task.num_heads = shared;
      task.num_rows = end - row;
      task.keys = cache->keys<T>(index, group) + (size_t)span.first_position * K;
      task.values = cache->values<T>(index, group) + (size_t)span.first_position * cache->value_size();
      task.head = K;
      task.num_cached = span.cached;
      task.num_own = span.length;
      task.first_row = row;
      task.visible = span.visible;
      task.scores = model->scratch_[thread].data();
      if constexpr (std::is_same_v<T, float>)
        model->kernels->attend_f32(task);
      else
        model->kernels->attend_f16(task);
      for (int r = row; r < end && rounded.rounding == Rounding::groups; ++r) {
        const int column = (group * shared + r % shared) * K;
        model->round_groups(rounded, model->prepared_attended_, span.start + r / shared, column, column + K);
      }
    }
  };
  const Attending work{this, index, &cache, rounded};
  threads_.run((int)queries_.size(), work);
}

void Model::run(const int* tokens, const int* positions, int n, const std::vector<Span>& spans, Cache& cache,
                const std::vector<int>& adapted, const std::vector<int>& asked, float* hidden) {
  const int D = config.width, I = config.mlp_width, H = config.num_heads, G = config.num_kv_heads, K = config.head_size, q = H * K;
  const Threads::Awake awake(threads_);
  reserve(n);
  for (int i = 0; i < n; ++i) {
    grow_rotations(positions[i]);
    unpack_row(embedding.matrix, tokens[i], x_.row(i));
  }
  runs_.clear();
  num_adapted_ = (int)adapted.size();
  for (int i : adapted) {
    if (!mask_embedding.empty()) std::memcpy(x_.row(i), mask_embedding.data(), (size_t)D * 4);
    if (!runs_.empty() && runs_.back().first + runs_.back().count == i)
      ++runs_.back().count;
    else
      runs_.push_back({i, 1});
  }
  for (const Span& s : spans)
    for (int i = 0; i < s.length; ++i) slots_[s.start + i] = s.first_position + s.cached + i;
  share_attention(spans);
  const auto normalized = [&](const std::vector<float>& weight) {
    return Fill{D, [&, w = weight.data()](int r) { kernels->rms_norm(x_.row(r), w, D, config.norm_eps, normed_.row(r)); }};
  };
  for (int index = 0; index < config.num_layers; ++index) {
    const Layer& layer = layers[index];
    const auto next_of = [&](const Layer& of, Place place) {
      const Matrix& first = is_adapted(of, place) ? of.adapters[place].a.matrix : of.maps[place].matrix;
      const std::vector<Job>& jobs = is_adapted(of, place) ? low_jobs(place, first) : jobs_[place];
      return Next{&first, jobs.data(), (int)jobs.size()};
    };
    const auto next = [&](Place place) { return next_of(layer, place); };
    const auto rounding_at = [&](Place place) { return rounding(layer.maps[place]); };

    const Rows normed = prepare(normed_, n, D, rounding_at(kQkv), prepared_, normalized(layer.attention_norm));
    Finish turns;
    turns.layer = &layer, turns.index = index, turns.positions = positions, turns.cache = &cache;
    if (turns_in_job_) turns.kind = Finish::turn;
    apply(layer, kQkv, normed, normed_, n, qkv_, false, turns, next(kOutput));
    if (!turns_in_job_)
      each_row(n, (H + 2 * G) * K, [&](int i) {
        for (int head = 0; head < H + 2 * G; ++head) turn(turns, i, head);
      });

    Rows attended = rows_of(attended_, n, q, rounding_at(kOutput), prepared_attended_);
    const bool rounds_heads = attended.rounding == Rounding::groups && K % kGroup == 0;
    if (cache.is_half())
      attend<uint16_t>(index, cache, rounds_heads ? attended : Rows());
    else
      attend<float>(index, cache, rounds_heads ? attended : Rows());
    if (!rounds_heads) attended = prepare(attended_, n, q, attended.rounding, prepared_attended_, {});
    apply(layer, kOutput, attended, attended_, n, x_, true, {}, next(kGateUp));

    const Rows again = prepare(normed_, n, D, rounding_at(kGateUp), prepared_, normalized(layer.mlp_norm));
    Rows gated = rows_of(gated_, n, I, rounding_at(kDown), prepared_gated_);
    const bool rounds_gated = gates_in_job_ && gated.rounding == Rounding::groups;
    Finish gates;
    if (gates_in_job_) gates.kind = Finish::gate;
    if (rounds_gated) gates.rounded = gated, gates.room = &prepared_gated_;
    apply(layer, kGateUp, again, normed_, n, gate_up_, false, gates, next(kDown));
    // an exponential costs about four times a plain number
    const Fill fill = gates_in_job_ ? Fill{} : Fill{4 * I, [&](int r) { gate(r, 0, I); }};
    if (!rounds_gated) gated = prepare(gated_, n, I, gated.rounding, prepared_gated_, fill);
    const bool is_last = index + 1 == config.num_layers;
    apply(layer, kDown, gated, gated_, n, x_, true, {}, is_last ? Next{&head_weights().matrix} : next_of(layers[index + 1], kQkv));
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
    kernels->multiply(m, from, to, x, count, {logits, stride, false, 1.0f}, ahead(m, to));
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
