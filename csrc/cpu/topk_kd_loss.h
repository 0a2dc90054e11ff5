#pragma once

#include <cstdint>

#include "kd_loss.h"
#include "matrix.h"

namespace kdfast {

enum class Tail { kBucket, kRenormalize, kNone, kSupport };

template <class Real>
struct TopkKdLossRows {
  Matrix student;          // (outer_rows, inner_rows, width)
  Matrix gradient;         // (outer_rows, inner_rows, width), or no data; may be `student` itself
  const Real* log_probs;   // (rows, entries)
  const int64_t* indices;  // (rows, entries), ascending; below 0: no entry
  int64_t outer_rows;
  int64_t inner_rows;
  int64_t width;
  int64_t vocab_size;
  int64_t entries;
  PerRow<int64_t> labels;
  int64_t ignore_index;
  PerRow<Real> token_weight;
  PerRow<Real> temperature;
  PerRow<Real> grad_scale;
  Real* losses;  // (3, rows): total, soft, hard
  Tail tail;
  Divergence divergence;  // kForwardKl, kReverseKl or kJsd
  double beta;
  double alpha;
  bool scale_t2;
  bool need_hard;
  double smallest_bucket;
  int threads;
};

// The losses of every row, and the gradient where there is a buffer for it, as kdfast/reference.py
// has them. A row is read from memory once, and once more from L2 for its gradient, which is
// written once. A softmax over the support alone reads the support alone.
template <class Real>
void topk_kd_loss_rows(const TopkKdLossRows<Real>& call);

}  // namespace kdfast
