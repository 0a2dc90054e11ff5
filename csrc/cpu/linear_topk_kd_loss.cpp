#include "linear_topk_kd_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pages.h"
#include "softmax.h"

namespace kdfast {
namespace {

// Threads take blocks of about this many bytes of the weight's gradient: two of them that touch a
// fresh page of 2 MiB at once would both clear it, and frequent tokens stand together.
constexpr int64_t kBlockBytes = int64_t{1} << 22;

template <class T, class Real>
KDFAST_CLONES Real dot(const Real* x, const T* y, int64_t n) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * to_real(y[i]);
  return sum;
}

template <class T, class Real>
KDFAST_CLONES void add(Real factor, const T* x, int64_t n, Real* sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) sum[i] += factor * to_real(x[i]);
}

// A row in the precision of the computation, converted into `buffer` where it has another.
template <class Real>
const Real* whole_row(const Matrix& matrix, int64_t row, int64_t width, Real* buffer) {
  return load(matrix.row(0, row), matrix.dtype, 0, width, buffer);
}

}  // namespace

template <class Real>
void entry_logits(const EntryLogits<Real>& call) {
#pragma omp parallel num_threads(call.threads)
  {
    std::vector<Real> buffer(call.width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < call.rows; ++row) {
      const Real* hidden = whole_row(call.hidden, row, call.width, buffer.data());
      for (int64_t entry = row * call.entries; entry < (row + 1) * call.entries; ++entry) {
        const int64_t column = call.indices[entry];
        call.logits[entry] = 0;
        if (column < 0) continue;
        with_elements<Real>(call.weight.row(0, column), call.weight.dtype, [&](const auto* weight) {
          call.logits[entry] = dot(hidden, weight, call.width);
        });
      }
    }
  }
}

template <class Real>
void entry_hidden_gradient(const EntryHiddenGradient<Real>& call) {
#pragma omp parallel for schedule(static) num_threads(call.threads)
  for (int64_t row = 0; row < call.rows; ++row) {
    Real* out = call.out + row * call.width;
    std::fill(out, out + call.width, Real(0));
    for (int64_t entry = row * call.entries; entry < (row + 1) * call.entries; ++entry) {
      const int64_t column = call.indices[entry];
      if (column < 0) continue;
      with_elements<Real>(call.weight.row(0, column), call.weight.dtype, [&](const auto* weight) {
        add(call.gradient[entry], weight, call.width, out);
      });
    }
  }
}

template <class Real>
void entry_weight_gradient(const EntryWeightGradient<Real>& call) {
  const int64_t row_bytes = std::max<int64_t>(1, call.width * sizeof(Real));
  const int64_t block = std::max<int64_t>(1, kBlockBytes / row_bytes);
  const int64_t blocks = (call.out_rows + block - 1) / block;
#pragma omp parallel for schedule(dynamic) num_threads(call.threads)
  for (int64_t b = 0; b < blocks; ++b) {
    for (int64_t i = b * block; i < std::min((b + 1) * block, call.out_rows); ++i) {
      Real* out = call.out + i * call.width;
      std::fill(out, out + call.width, Real(0));
      for (int64_t at = call.offsets[i]; at < call.offsets[i + 1]; ++at) {
        const int64_t entry = call.order[at];
        char* hidden = call.hidden.row(0, entry / call.entries);
        with_elements<Real>(hidden, call.hidden.dtype, [&](const auto* row) {
          add(call.gradient[entry], row, call.width, out);
        });
      }
    }
  }
}

template void entry_logits(const EntryLogits<float>&);
template void entry_logits(const EntryLogits<double>&);
template void entry_hidden_gradient(const EntryHiddenGradient<float>&);
template void entry_hidden_gradient(const EntryHiddenGradient<double>&);
template void entry_weight_gradient(const EntryWeightGradient<float>&);
template void entry_weight_gradient(const EntryWeightGradient<double>&);

}  // namespace kdfast
