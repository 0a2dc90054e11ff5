#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

// The few logits of a row that a support needs, from the rows of the head's weight that make them,
// and their gradients. An index below 0 is an entry that does not exist.

// logits[r, j] = hidden[r] · weight[indices[r, j]], or 0.
template <class Real>
struct EntryLogits {
  Matrix hidden;           // (1, rows, width)
  Matrix weight;           // (1, vocab, width)
  const int64_t* indices;  // (rows, entries)
  int64_t rows;
  int64_t entries;
  int64_t width;
  Real* logits;  // (rows, entries)
  int threads;
};

template <class Real>
void entry_logits(const EntryLogits<Real>& call);

// out[r] = Σ_j gradient[r, j] · weight[indices[r, j]].
template <class Real>
struct EntryHiddenGradient {
  const Real* gradient;  // (rows, entries)
  Matrix weight;         // (1, vocab, width)
  const int64_t* indices;
  int64_t rows;
  int64_t entries;
  int64_t width;
  Real* out;  // (rows, width)
  int threads;
};

template <class Real>
void entry_hidden_gradient(const EntryHiddenGradient<Real>& call);

// out[i] = Σ gradient[e] · hidden[e / entries] over e in order[offsets[i] : offsets[i + 1]], in
// that order: the same bits on any number of threads.
template <class Real>
struct EntryWeightGradient {
  const Real* gradient;  // (rows, entries)
  Matrix hidden;         // (1, rows, width)
  const int64_t* order;
  const int64_t* offsets;  // (out_rows + 1)
  int64_t entries;
  int64_t width;
  int64_t out_rows;
  Real* out;  // (out_rows, width)
  int threads;
};

template <class Real>
void entry_weight_gradient(const EntryWeightGradient<Real>& call);

}  // namespace kdfast
