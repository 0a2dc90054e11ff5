#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

template <class Real>
struct TruncatedSoftmaxRows {
  Matrix logits;  // (outer_rows, inner_rows, >= vocab_size)
  int64_t outer_rows;
  int64_t inner_rows;
  int64_t vocab_size;
  int64_t k;
  PerRow<Real> temperature;
  Real* log_probs;   // (rows, k)
  int64_t* indices;  // (rows, k)
  int threads;
};

// The k largest log-probabilities of every row under the softmax of all of it, and their columns,
// as kdfast/reference.py has it. Each logit is read from memory once.
template <class Real>
void truncated_softmax_rows(const TruncatedSoftmaxRows<Real>& call);

}  // namespace kdfast
