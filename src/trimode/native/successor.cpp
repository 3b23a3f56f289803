// Drafts that know the draft before them: `trimode.model.successor`, one block of masks at a time.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "model.h"

namespace trimode {
namespace {

constexpr float kEpsilon = 1.1920929e-7f;  // what PyTorch adds to a mean square unless told otherwise

// the places of the `count` greatest values, but for one; the greatest first, and of equals the first
void greatest(const Kernels& kernels, const float* values, int size, int but, int count, int* places) {
  const auto is_before = [values](int a, int b) { return values[a] > values[b] || (values[a] == values[b] && a < b); };
  int num = 0;
  for (int i = 0; i < size; ++i) {
    if (num == count) {
      i = kernels.next_above(values, i, size, values[places[0]]);
      if (i == size) break;
    }
    if (i == but) continue;
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

void Model::times(const Weights& w, const float* x, size_t x_stride, int num_rows, float* y, size_t y_stride, int from, int to) {
  Rows rows;
  rows.values = x;
  rows.stride = x_stride;
  kernels->multiply(w.matrix, from, to, rows, num_rows, {y, y_stride, false, 1.0f}, {});
}

// What a successor makes of hidden states alone: a part of each mask's inner numbers, in `inner_`.
void Model::begin_to_score(const float* hidden, int num) {
  const Matrix& w = successor.from_hidden.matrix;
  ones_.resize(round_up(config.width, kLanes), 1.0f);
  both_.reserve(num + 1, config.width);
  inner_.reserve(num + 1, w.num_outputs);
  changed_.reserve(1, config.width);
  for (std::vector<float>& row : scratch_) row.resize(std::max(row.size(), (size_t)config.width));
  for (int j = 0; j < num; ++j) {
    std::memcpy(both_.row(j), hidden + (size_t)j * config.width, (size_t)config.width * 4);
    kernels->rms_norm(both_.row(j), ones_.data(), config.width, kEpsilon, both_.row(j));
  }
}

void Model::score_again(const float* hidden, int mask, int num, int before, const int* tokens, int count, float* scores) {
  const Successor& s = successor;
  const int D = config.width, R = s.from_hidden.matrix.num_outputs;
  const Weights& head = head_weights();
  unpack_row(embedding.matrix, before, both_.row(num));
  kernels->rms_norm(both_.row(num), ones_.data(), D, kEpsilon, both_.row(num));
  times(s.from_before, both_.row(num), both_.stride, 1, inner_.row(num), inner_.stride, 0, s.from_before.matrix.num_panels);
  for (int r = 0; r < R; ++r) {
    const float x = inner_.row(mask)[r] + inner_.row(num)[r];
    inner_.row(mask)[r] = x / (1.0f + std::exp(-x));
  }
  times(s.outer, inner_.row(mask), inner_.stride, 1, changed_.row(0), changed_.stride, 0, s.outer.matrix.num_panels);
  for (int d = 0; d < D; ++d) changed_.row(0)[d] += hidden[(size_t)mask * D + d];
  threads_.run(count, [&](int i, int thread) {
    unpack_row(head.matrix, tokens[i], scratch_[thread].data());
    scores[i] = dot(scratch_[thread].data(), changed_.row(0), D);
  });
}

void Model::rescore(const float* hidden, const float* logits, int before, int but, int count, int* tokens, float* scores) {
  const Threads::Awake awake(threads_);
  greatest(*kernels, logits, config.vocab_size, but, count, tokens);
  begin_to_score(hidden, 1);
  times(successor.from_hidden, both_.values, both_.stride, 1, inner_.values, inner_.stride, 0, successor.from_hidden.matrix.num_panels);
  score_again(hidden, 0, 1, before, tokens, count, scores);
}

void Model::draft(const float* hidden, int num, const float* logits, size_t stride, int before, int but, int count, int* drafts,
                  float* probabilities) {
  const Threads::Awake awake(threads_);
  const int V = config.vocab_size;
  std::vector<int> likely((size_t)num * count);
  std::vector<float> maxima(num), sums(num), scores(count);
  begin_to_score(hidden, num);
  const int num_panels = successor.from_hidden.matrix.num_panels;
  threads_.run(num + num_panels, [&](int j, int) {
    if (j >= num) return times(successor.from_hidden, both_.values, both_.stride, num, inner_.values, inner_.stride, j - num, j - num + 1);
    const float* row = logits + (size_t)j * stride;
    int* const tokens = &likely[(size_t)j * count];
    greatest(*kernels, row, V, but, count, tokens);
    maxima[j] = but >= 0 ? std::max(row[tokens[0]], row[but]) : row[tokens[0]];
    sums[j] = kernels->sum_exp(row, V, maxima[j]);
  });
  for (int j = 0; j < num; ++j) {
    const int* tokens = &likely[(size_t)j * count];
    const float* row = logits + (size_t)j * stride;
    score_again(hidden, j, num, before, tokens, count, scores.data());
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
