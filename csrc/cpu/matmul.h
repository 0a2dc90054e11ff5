#pragma once

#include <cstdint>

#include "matrix.h"

namespace kdfast {

// A factor of a product, with strides of any kind (in elements).
struct Factor {
  const char* data;
  int64_t row_stride;
  int64_t column_stride;
  DType dtype;
};

// out = left · right, or out += left · right, in float32 whatever the factors are in.
struct MatMul {
  Factor left;   // (rows, depth)
  Factor right;  // (depth, columns)
  float* out;    // (rows, columns), columns side by side
  int64_t out_row;
  int64_t rows;
  int64_t columns;
  int64_t depth;
  bool add;
  int threads;
};

// Every thread computes a rectangle of `out`, from blocks of the factors that it packs into its
// caches. An element is the same sum in the same order whatever the threads, the rows and the
// columns beside it.
void matmul(const MatMul& call);

// Whether this is a processor whose vectors a BLAS made for another maker's leaves half empty.
bool has_unused_vectors();

}  // namespace kdfast
