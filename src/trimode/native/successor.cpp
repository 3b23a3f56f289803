// Drafts that know the draft before them: `trimode.model.successor`, one block of masks at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace trimode {
namespace {

constexpr float kEpsilon = 1.1920929e-7f;  // what PyTorch adds to a mean square unless told otherwise

// the places of the `count` greatest values, but for one; the greatest first, and of equals the first
void greatest(const float* values, int size, int but, int count, int* places) {
  const auto is_before = [values](int a, int b) { return values[a] > values[b] || (values[a] == values[b] && a < b); };
  int num = 0;
  for (int i = 0; i < size; ++i) {
    if (i == but || (num == count && !(values[i] > values[places[0]]))) continue;
    if (num == count) {
      std::pop_heap(places, places + num, is_before);
      --num;
    }
    places[num++] = i;
    std::push_heap(places, places + num, is_before);  // the last of them is on top
  }
  std::sort_heap(places, places + num, is_before);
  for (; num < count; ++num) places[num] = 0;  // where nothing is a number
}

float dot(const float* a, const float* b, int size) {
  float sums[kLanes] = {};
  int i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int l = 0; l < kLanes; ++l) sums[l] += a[i + l] * b[i + l];
  for (; i < size; ++i) sums[0] += a[i] * b[i];
  float sum = 0.0f;
  for (float s : sums) sum += s;
  return sum;
}

}  // namespace

void Model::score_again(const float* hidden, int before, const int* tokens, int count, float* scores) {
  const Successor& s = successor;
  const int D = config.width, R = s.from_hidden.matrix.num_outputs;
  const Weights& head = head_weights();
  ones_.resize(round_up(D, kLanes), 1.0f);
  both_.reserve(2, D);
  inner_.reserve(2, R);
  changed_.reserve(1, D);
  std::memcpy(both_.row(0), hidden, (size_t)D * 4);
  unpack_row(embedding.matrix, before, both_.row(1));
  for (int i : {0, 1}) kernels->rms_norm(both_.row(i), ones_.data(), D, kEpsilon, both_.row(i));
  const auto times = [&](const Weights& w, Floats2d& x, int row, Floats2d& y, int to) {
    Rows rows;
    rows.values = x.row(row);
    rows.stride = x.stride;
    kernels->multiply(w.matrix, 0, w.matrix.num_panels, rows, 1, {y.row(to), y.stride, false, 1.0f}, {});
  };
  times(s.from_hidden, both_, 0, inner_, 0);
  times(s.from_before, both_, 1, inner_, 1);
  for (int r = 0; r < R; ++r) {
    const float x = inner_.row(0)[r] + inner_.row(1)[r];
    inner_.row(0)[r] = x / (1.0f + std::exp(-x));
  }
  times(s.outer, inner_, 0, changed_, 0);
  for (int d = 0; d < D; ++d) changed_.row(0)[d] += hidden[d];
  for (std::vector<float>& row : scratch_) row.resize(std::max(row.size(), (size_t)D));
  threads_.run(count, [&](int i, int thread) {
    unpack_row(head.matrix, tokens[i], scratch_[thread].data());
    scores[i] = dot(scratch_[thread].data(), changed_.row(0), D);
  });
}

void Model::rescore(const float* hidden, const float* logits, int before, int but, int count, int* tokens, float* scores) {
  const Threads::Awake awake(threads_);
  greatest(logits, config.vocab_size, but, count, tokens);
  score_again(hidden, before, tokens, count, scores);
}

void Model::draft(const float* hidden, int num, const float* logits, size_t stride, int before, int but, int count, int* drafts,
                  float* probabilities) {
  const Threads::Awake awake(threads_);
  const int V = config.vocab_size;
  std::vector<int> likely((size_t)num * count);
  std::vector<float> maxima(num), sums(num), scores(count);
  threads_.run(num, [&](int j, int) {
    const float* row = logits + (size_t)j * stride;
    int* const tokens = &likely[(size_t)j * count];
    greatest(row, V, but, count, tokens);
    maxima[j] = but >= 0 ? std::max(row[tokens[0]], row[but]) : row[tokens[0]];
    sums[j] = kernels->sum_exp(row, V, maxima[j]);
  });
  for (int j = 0; j < num; ++j) {
    const int* tokens = &likely[(size_t)j * count];
    const float* row = logits + (size_t)j * stride;
    score_again(hidden + (size_t)j * config.width, before, tokens, count, scores.data());
    const int best = (int)(std::max_element(scores.begin(), scores.end()) - scores.begin());
    // of all tokens' exponentials those of the candidates are exchanged
    const double maximum = std::max(maxima[j], scores[best]);
    double others = sums[j], ours = 0.0;
    for (int i = 0; i < count; ++i) {
      others -= std::exp((double)row[tokens[i]] - maxima[j]);
      ours += std::exp(scores[i] - maximum);
    }
    const double sum = ours + std::max(others, 0.0) * std::exp(maxima[j] - maximum);
    before = drafts[j] = tokens[best];
    probabilities[j] = (float)(std::exp(scores[best] - maximum) / sum);
  }
}

}  // namespace trimode
