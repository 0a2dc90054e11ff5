// The way of a kernel over a row of logits: one chunk after the other, each in the precision of the
// computation, with a softmax that runs along.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "matrix.h"
#include "simd.h"

namespace kdfast {
// Every kernel has its own copies: clones that several objects share do not link.
namespace {

// One chunk of a row, or of two, stays in L1 while it is converted, maximised and exponentiated.
constexpr int64_t kChunk = 2048;

// Exponentials are powers of two: the scale that a logit is multiplied by takes log2 e in.
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

template <class T, class Real>
KDFAST_CLONES void convert(const T* in, int64_t n, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = to_real(in[i]);
}

// Elements [begin, begin + n) of a row in the precision of the computation: the row itself where it
// has it, a converted copy in `buffer` otherwise.
template <class Real>
const Real* load(const char* row, DType dtype, int64_t begin, int64_t n, Real* buffer);

template <>
inline const float* load(const char* row, DType dtype, int64_t begin, int64_t n, float* buffer) {
  if (dtype == DType::kFloat32) return reinterpret_cast<const float*>(row) + begin;
  if (dtype == DType::kBFloat16)
    convert(reinterpret_cast<const bfloat16*>(row) + begin, n, buffer);
  else
    convert(reinterpret_cast<const float16*>(row) + begin, n, buffer);
  return buffer;
}

template <>
inline const double* load(const char* row, DType, int64_t begin, int64_t, double*) {
  return reinterpret_cast<const double*>(row) + begin;
}

// Calls `function` with a row as an array of its elements.
template <class Real, class Function>
void with_elements(char* row, DType dtype, Function function) {
  if constexpr (sizeof(Real) == sizeof(double))
    function(reinterpret_cast<double*>(row));
  else if (dtype == DType::kFloat32)
    function(reinterpret_cast<float*>(row));
  else if (dtype == DType::kBFloat16)
    function(reinterpret_cast<bfloat16*>(row));
  else
    function(reinterpret_cast<float16*>(row));
}

template <class Real>
KDFAST_CLONES Real max_of(const Real* x, int64_t n) {
  Real max = -std::numeric_limits<Real>::infinity();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

// The softmax of one side of a row, one chunk after the other: exponentials relative to the running
// maximum, and their sum in double.
template <class Real>
struct RunningSoftmax {
  Real scale;  // log2 e / temperature
  Real max = -std::numeric_limits<Real>::infinity();
  double sum = 0;

  // What a row of -inf is shifted by: -inf - (-inf) would be NaN.
  Real shift() const { return max == -std::numeric_limits<Real>::infinity() ? Real(0) : max; }

  // How far the exponents move, in bits: what was summed so far shrinks by 2 to the power of it.
  double raise_max(Real chunk_max) {
    const Real before = shift();
    max = std::max(max, chunk_max);
    const double delta = (double(before) - shift()) * scale;
    // Nothing but -inf came before: there is nothing to rescale, and exp(delta) may overflow.
    decay = sum == 0 ? 0 : std::exp2(delta);
    sum *= decay;
    return delta;
  }

  double decay = 1;
};

// out = 2^((x - shift) · scale), and its sum.
template <class Real>
KDFAST_CLONES Real exponentiate(const Real* x, int64_t n, Real shift, Real scale, Real* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    out[i] = exp2_nonpositive((x[i] - shift) * scale);
    sum += out[i];
  }
  return sum;
}

// How far, in bits, exponents may exceed 0 before a sum misses the bits that they lose. A running
// maximum that is exceeded by less need not be raised: a pass over a chunk for its maximum alone
// waits for memory and computes nothing.
constexpr int kMostBitsAboveMax = 4;

// 2^bits, cut off far above kMostBitsAboveMax: it must not wrap around.
template <class Real>
KDFAST_INLINE Real exp2_cut(Real bits) {
  constexpr Real kMostBits = 64;
  return exp2_nonpositive(kMostBits < bits ? kMostBits : bits);
}

}  // namespace
}  // namespace kdfast
