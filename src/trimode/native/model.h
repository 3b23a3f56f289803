// The whole forward of a Llama-like model over one cache, on the CPU. One thread at a time may call a model.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace trimode {

struct Config {
  int vocab_size, width, mlp_width, num_layers, num_heads, num_kv_heads, head_size;
  float norm_eps;
  float rope_scale;          // of cosines and sines
  float llama4_beta;         // 0: off
  int original_positions;    // of Llama 4's query scale
  std::vector<float> frequencies;
};

// Memory that begins at 64 bytes, zeroed; what is never touched takes none.
class Block {
 public:
  Block() = default;
  explicit Block(size_t bytes);
  uint8_t* data() const { return data_; }
  size_t size() const { return bytes_; }

 private:
  std::shared_ptr<void> owner_;
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
};

// A packed matrix that owns its bytes, or borrows them from a mapped file.
struct Weights {
  Matrix matrix;
  Block own;
  bool is_set() const { return matrix.data != nullptr; }
};

inline int round_up(int n, int to) { return (n + to - 1) / to * to; }

Matrix shape_of(Format format, int num_outputs, int num_inputs);
Weights make_weights(Format format, int num_outputs, int num_inputs);
// rows [first, first + count) from floats [count][num_inputs]; quantised to the format if it is one of integers
void pack_floats(Weights&, int first, int count, const float* rows);
// the same from GGUF's blocks of 32, exactly (Q8_0 for u8; Q4_0 and Q4_1 for u4) or rounded again (s8); row i of the blocks is row order[i]
enum class Blocks : int { q4_0 = 2, q4_1 = 3, q8_0 = 8 };
size_t row_bytes(Blocks encoding, int num_inputs);
void pack_blocks(Weights&, Blocks encoding, const std::vector<int>& order, const uint8_t* raw);
// one row back as floats
void unpack_row(const Matrix&, int row, float* out);

struct AdapterPart {
  Weights b;
  int column = 0;      // where its inputs begin among the low ones of its group
  int output = 0;      // where its outputs begin
};
struct AdapterGroup {  // parts that share their inputs
  Weights a;
  std::vector<AdapterPart> parts;
};
struct Successor {     // [R, D], [R, D], [D, R]
  Weights from_hidden, from_before, outer;
};
enum Place { kQkv = 0, kOutput = 1, kGateUp = 2, kDown = 3, kPlaces = 4 };

struct Layer {
  Weights maps[kPlaces];
  std::vector<float> biases[kPlaces];
  std::vector<float> attention_norm, mlp_norm, q_norm, k_norm;
  AdapterGroup adapters[kPlaces];
};

class Cache {
 public:
  Cache(const Config&, int num_positions, bool is_half);
  void copy(int source, int target, int count);
  size_t num_bytes() const { return keys_.size() + values_.size(); }
  bool is_half() const { return is_half_; }
  int num_positions() const { return num_positions_; }
  bool is_of(const Config& c) const { return num_layers_ == c.num_layers && num_heads_ == c.num_kv_heads && head_size_ == c.head_size; }

  template <typename T>
  T* keys(int layer, int head) const {
    return reinterpret_cast<T*>(keys_.data()) + ((size_t)layer * num_heads_ + head) * num_positions_ * head_size_;
  }
  template <typename T>
  T* values(int layer, int head) const {
    return reinterpret_cast<T*>(values_.data()) + ((size_t)layer * num_heads_ + head) * num_positions_ * value_size_;
  }
  int value_size() const { return value_size_; }

 private:
  template <typename T>
  void copy_as(int source, int target, int count);
  int num_layers_, num_heads_, head_size_, value_size_, num_positions_;
  bool is_half_;
  Block keys_, values_;
};

struct Span {
  int start, length;
  int first_position;  // of its slot among the cache's positions; a multiple of 16
  int cached;
  const uint8_t* visible;  // [length][length]; null: causal
};

class Model {
 public:
  Model(Config config, int num_threads, const Kernels* kernels);

  // Runs all layers; `hidden` [asked][width] gets the normalised states of the inputs that are asked for.
  void run(const int* tokens, const int* positions, int num_inputs, const std::vector<Span>& spans, Cache& cache,
           const std::vector<int>& adapted, const std::vector<int>& asked, float* hidden);
  // Logits [count][stride] of hidden states, and of each the greatest but for token `but`, where it is, and the log of the sum of all
  // exponentials.
  void head(const float* hidden, int count, int but, float* logits, size_t stride, int* best, float* logsumexp);

  // What a mask's hidden state and the token before it make of the scores of the mask's `count` likeliest tokens, `but` left out.
  void rescore(const float* hidden, const float* logits, int before, int but, int count, int* tokens, float* scores);
  // The likeliest tokens of `num` masks, each chosen of its `count` likeliest by its score behind the one before it, and their
  // probabilities there.
  void draft(const float* hidden, int num, const float* logits, size_t stride, int before, int but, int count, int* drafts,
             float* probabilities);

  const Config config;
  const Kernels* const kernels;
  Weights embedding;  // its rows are read; also the head where the two are tied
  Weights output_head;
  std::vector<Layer> layers;
  std::vector<float> norm;
  float adapter_scale = 1.0f;
  std::vector<float> mask_embedding;
  Successor successor;
  // Activations are rounded to int8 for products with integer weights; else those weights are widened.
  bool rounds_activations = true;
  int num_threads() const { return threads_.count(); }

 private:
  struct Floats2d {
    float* values = nullptr;
    size_t stride = 0;
    float* row(int r) const { return values + (size_t)r * stride; }
  };
  struct Room : Floats2d {
    std::vector<float> memory;
    void reserve(int rows, int columns);
  };
  struct Prepared {  // rows as a product wants them
    std::vector<int8_t> quantized;
    std::vector<RowGroup> groups;
    std::vector<float> scales;
    std::vector<int32_t> biases;
  };

  struct Panels {
    int from = 0, to = 0;
  };
  // Outputs of a map that one thread computes, and what follows from them alone: a head, or numbers of gate and up.
  struct Job {
    Panels own, also;
  };
  // A product that is part of a map's result: the map itself, or what an adapter adds to some rows and outputs.
  struct Term {
    const Matrix* matrix;
    Rows x;
    int first, count;  // rows of the result
    int output;        // where its outputs begin
    bool add;
    float scale;
  };
  // What the thread that made a job's outputs does with them. Plain values: they travel with the job.
  struct Finish {
    enum Kind { nothing, turn, gate } kind = nothing;
    Rows rounded;  // of groups: to be rounded in the end
    Prepared* room = nullptr;
    const float* bias = nullptr;
    int num_biases = 0;
    const Layer* layer = nullptr;
    int index = 0;
    const int* positions = nullptr;
    const Cache* cache = nullptr;
  };
  struct Product {
    const Job* jobs = nullptr;
    int num_jobs = 0;
    Floats2d y;
    int num_rows = 0;
    Finish finish;
    int num_terms = 0;
    Term few[3];
    std::vector<Term> many;
    const Term* terms() const { return many.empty() ? few : many.data(); }
    void put(const Term& t) {
      if (num_terms >= 3 && many.empty()) many.assign(few, few + 3);
      if (num_terms < 3)
        few[num_terms] = t;
      else
        many.push_back(t);
      ++num_terms;
    }
  };
  struct Multiplying;
  // The product after this one, whose weights are fetched meanwhile.
  struct Next {
    const Matrix* matrix = nullptr;
    const Job* jobs = nullptr;
    int num_jobs = 0;
  };
  struct Queries {  // of heads that share keys: row r is head r % num_heads of input r / num_heads
    Span span;
    int group, row, end;
  };
  struct Run {  // adapted inputs that follow one another
    int first, count;
  };

  const Weights& head_weights() const { return output_head.is_set() ? output_head : embedding; }
  Rounding rounding(const Weights& w) const {
    return rounds_activations ? rounding_of(w.matrix.format) : Rounding::none;
  }
  void reserve(int num_inputs);
  // What makes a row, and how many plain numbers that costs.
  struct Fill {
    int cost = 0;
    std::function<void(int)> work;
  };
  std::vector<Job> split(int num_outputs) const;
  const std::vector<Job>& low_jobs(Place place, const Matrix& a);
  // Whether an adapter acts on inputs of this forward there.
  bool is_adapted(const Layer& layer, Place place) const { return !runs_.empty() && layer.adapters[place].a.is_set(); }
  // Rows with room for what rounding makes of them.
  static Rows rows_of(const Floats2d& x, int num_rows, int num_inputs, Rounding rounding, Prepared& room);
  // numbers [from, to) of a row, whole groups
  void round_groups(const Rows& rows, Prepared& room, int row, int from, int to);
  Rows prepare(const Floats2d& x, int num_rows, int num_inputs, Rounding rounding, Prepared& room, const Fill& fill);
  void multiply(const Product& first, const Product* second, const Next& following);
  void finish(const Finish& f, const Floats2d& y, const Job& job, int row, int end);
  // y = a map of x, or y plus it, adapters and biases included. floats: x as it was before it was rounded
  void apply(const Layer& layer, Place place, const Rows& x, const Floats2d& floats, int num_rows, const Floats2d& y, bool add,
             Finish finish, const Next& following);
  void each_row(int num_rows, int per_row_cost, const std::function<void(int)>& work);
  // A head of an input: a query or key is normalised and rotated, a key or value is written to the cache.
  void turn(const Finish& f, int input, int head);
  void gate(int row, int from, int to);
  void share_attention(const std::vector<Span>& spans);
  // rounded: rows of groups to be rounded by the thread that made them, or of none
  template <typename T>
  void attend(int index, const Cache& cache, const Rows& rounded);
  void grow_rotations(int position);
  // y = w x of some rows, panels [from, to), in floats
  void times(const Weights& w, const float* x, size_t x_stride, int num_rows, float* y, size_t y_stride, int from, int to);
  void begin_to_score(const float* hidden, int num);
  // of the likeliest tokens of mask `mask` of `num`, behind the token `before`
  void score_again(const float* hidden, int mask, int num, int before, const int* tokens, int count, float* scores);

  Threads threads_;
  Room x_, normed_, qkv_, attended_, gate_up_, gated_, low_, final_, both_, inner_, changed_;
  Prepared prepared_, prepared_attended_, prepared_gated_, prepared_low_, prepared_other_, prepared_final_;
  std::vector<Job> jobs_[kPlaces];
  bool turns_in_job_ = false, gates_in_job_ = false;  // whether heads, or groups of gated numbers, are whole panels
  std::vector<Job> low_jobs_[kPlaces];  // of an adapter's A
  std::vector<Queries> queries_;
  std::vector<Run> runs_;
  int num_adapted_ = 0;
  std::vector<float> cosines_, sines_, query_scales_;
  int num_rotations_ = 0;
  std::vector<std::vector<float>> scratch_;
  std::vector<float> ones_;
  std::vector<int> slots_;  // cache position of each input
};

}  // namespace trimode
