#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

// Pairs of hidden states, token by token.
template <class Real>
struct HiddenRows {
  Matrix student;   // (outer_rows, inner_rows, width)
  Matrix teacher;   // (outer_rows, inner_rows, width)
  Matrix gradient;  // (outer_rows, inner_rows, width), or no data; may be `student` itself
  int64_t outer_rows;
  int64_t inner_rows;
  int64_t width;
  PerRow<bool> mask;  // false: no loss, a gradient of 0, and nothing is read
  PerRow<Real> grad_scale;
  Real* losses;  // (rows)
  int threads;
};

// ‖student + bias − teacher‖² / width of every row, and the gradient where there is a buffer for
// it, in one sweep.
template <class Real>
void hidden_mse_rows(const HiddenRows<Real>& call, const Real* bias);

// 1 − cos of every row, of norms that are `epsilon` at least, and the gradient where there is a
// buffer for it. A row pair is read from memory once, and twice more from the cache.
template <class Real>
void hidden_cosine_rows(const HiddenRows<Real>& call, double epsilon);

}  // namespace kdfast
