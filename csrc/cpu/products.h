// Products of small matrices that stand in caches. BLAS libraries are made for large ones, and not
// every one of them fills the registers of every processor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define KDFAST_TARGET(features) __attribute__((target(features)))
#endif

namespace kdfast {

// out = left · right, or out += left · right. Elements of `left` stand anywhere; the columns of
// `right` and `out` stand side by side.
template <class Real>
struct Product {
  int64_t rows;
  int64_t columns;
  int64_t depth;
  const Real* left;
  int64_t left_row;
  int64_t left_depth;
  const Real* right;
  int64_t right_depth;
  Real* out;
  int64_t out_row;
  bool add = false;
  // The product is symmetric: tiles that stand under its diagonal whole are left out.
  bool upper = false;
};

// Tiles are whole: a product reads and writes a row more than it has where their number is odd, and
// columns up to the next multiple. What they hold does not matter.
constexpr int64_t kSlackRows = 2;
template <class Real>
constexpr int64_t kTileColumns = 128 / sizeof(Real);

// The step between rows of this many columns that can be a factor or a product. Not a power of two:
// a column's elements would all fall into one set of a cache.
template <class Real>
constexpr int64_t row_stride(int64_t columns) {
  const int64_t lines = (columns + kTileColumns<Real> - 1) / kTileColumns<Real> * 2 + 1;
  return lines * 64 / int64_t{sizeof(Real)};
}

// Every kernel has its own copies, for its own precision.
namespace {

#if defined(__GNUC__)
template <class Real, int kBytes>
struct Lanes {
  typedef Real Vector __attribute__((vector_size(kBytes), aligned(sizeof(Real)), may_alias));
};
#else
template <class Real, int kBytes>
struct Lanes {
  struct Vector {
    Real lane[kBytes / sizeof(Real)];
    Vector& operator+=(const Vector& other) {
      for (int i = 0; i < int(kBytes / sizeof(Real)); ++i) lane[i] += other.lane[i];
      return *this;
    }
    friend Vector operator*(Real factor, Vector vector) {
      for (Real& x : vector.lane) x *= factor;
      return vector;
    }
  };
};
#endif

// One tile of the product, kRows × 2 vectors of kBytes, in registers from its first term to the
// last: for each step along the depth two loads, and kRows scalars that are broadcast.
template <class Real, int kBytes, int kRows>
KDFAST_INLINE void multiply_tile(const Product<Real>& product, int64_t row, int64_t column) {
  using Vector = typename Lanes<Real, kBytes>::Vector;
  constexpr int kLanes = kBytes / sizeof(Real);
  Vector sums[kRows][2] = {};
  const Real* left = product.left + row * product.left_row;
  const Real* right = product.right + column;
  for (int64_t i = 0; i < product.depth; ++i) {
    const Vector first = *reinterpret_cast<const Vector*>(right);
    const Vector second = *reinterpret_cast<const Vector*>(right + kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Real factor = left[r * product.left_row];
      sums[r][0] += factor * first;
      sums[r][1] += factor * second;
    }
    left += product.left_depth;
    right += product.right_depth;
  }
  Real* out = product.out + row * product.out_row + column;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    Vector* parts[2] = {reinterpret_cast<Vector*>(out + r * product.out_row),
                        reinterpret_cast<Vector*>(out + r * product.out_row + kLanes)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      if (product.add) sums[r][i] += *parts[i];
      *parts[i] = sums[r][i];
    }
  }
}

template <class Real, int kBytes, int kRows>
KDFAST_INLINE void multiply_tiles(const Product<Real>& product) {
  constexpr int64_t kColumns = 2 * kBytes / sizeof(Real);
  static_assert(kTileColumns<Real> % kColumns == 0);
  // These columns of `right` stay in L1 for all rows.
  for (int64_t column = 0; column < product.columns; column += kColumns) {
    const int64_t rows = product.upper ? std::min(column + kColumns, product.rows) : product.rows;
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows)
      multiply_tile<Real, kBytes, kRows>(product, row, column);
    for (; row < rows; row += kSlackRows)
      multiply_tile<Real, kBytes, kSlackRows>(product, row, column);
  }
}

// As many accumulators as the processor's registers hold beside the factors.
#ifdef KDFAST_TARGET
template <class Real>
KDFAST_TARGET("avx512f,avx2,fma")
void multiply_avx512(const Product<Real>& product) {
  multiply_tiles<Real, 64, 8>(product);
}

template <class Real>
KDFAST_TARGET("avx2,fma")
void multiply_avx2(const Product<Real>& product) {
  multiply_tiles<Real, 32, 6>(product);
}
#endif

template <class Real>
void multiply(const Product<Real>& product) {
#ifdef KDFAST_TARGET
  static const bool avx512 = __builtin_cpu_supports("avx512f");
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512) return multiply_avx512(product);
  if (avx2) return multiply_avx2(product);
  multiply_tiles<Real, 16, 4>(product);
#else
  multiply_tiles<Real, 16, 8>(product);
#endif
}

}  // namespace
}  // namespace kdfast
