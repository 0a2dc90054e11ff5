#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

// Queries or keys: (samples, heads, tokens, channels) under three leading strides (in elements).
struct Heads {
  char* data;
  int64_t sample_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t heads;
  DType dtype;

  char* row(int64_t sample, int64_t head, int64_t token) const {
    const int64_t at = sample * sample_stride + head * head_stride + token * token_stride;
    return data + at * size_of(dtype);
  }
};

// E = Q_s K_sᵀ − ratio · Q_t K_tᵀ of each sample and head. Consecutive query heads share a key
// head.
template <class Real>
struct AttentionMse {
  Heads student_query;
  Heads student_key;
  Heads teacher_query;
  Heads teacher_key;
  Heads query_gradient;    // like student_query, or no data: factor · E K_s
  Heads key_gradient;      // like student_key, or no data: factor · Eᵀ Q_s
  const bool* query_mask;  // (samples, tokens), whether a token counts, or null
  const bool* key_mask;
  PerRow<Real> factor;  // by sample
  int64_t samples;
  int64_t tokens;
  int64_t student_width;
  int64_t teacher_width;
  Real ratio;
  bool causal;   // keys that stand behind a query do not count
  bool tiled;    // by tiles of E, and not by Gram matrices
  double* sums;  // (2, samples): Σ E², and the sum of the terms that it is a difference of
  int threads;
};

// The squares of E and both gradients; E is never there as a whole. A thread takes one of the
// student's key heads in one sample, and the query heads that share it. With tiles the rows are
// read once and stay; with Gram matrices they are read some tokens at a time, twice but for the
// last of them. Gradients are written once.
template <class Real>
void attention_mse(const AttentionMse<Real>& call);

}  // namespace kdfast
