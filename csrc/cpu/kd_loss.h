#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

enum class Divergence { kForwardKl, kReverseKl, kJsd, kSkewForwardKl, kSkewReverseKl, kTvd };

template <class Real>
struct KdLossRows {
  Matrix student;   // (outer_rows, inner_rows, width)
  Matrix teacher;   // (outer_rows, inner_rows, >= vocab_size)
  Matrix gradient;  // (outer_rows, inner_rows, width), or no data; may be `student` itself
  int64_t outer_rows;
  int64_t inner_rows;
  int64_t width;
  int64_t vocab_size;
  PerRow<int64_t> labels;
  int64_t ignore_index;
  PerRow<Real> token_weight;
  PerRow<Real> temperature;
  PerRow<Real> teacher_temperature;
  PerRow<Real> grad_scale;
  Real* losses;  // (3, rows): total, soft, hard
  Divergence divergence;
  double beta;
  double alpha;
  bool scale_t2;
  bool need_hard;
  int threads;
};

// The losses of every row, and the gradient where there is a buffer for it. A row pair is read from
// memory once and its gradient written once; the exponentials of a row are taken once and wait in
// L2.
template <class Real>
void kd_loss_rows(const KdLossRows<Real>& call);

}  // namespace kdfast
