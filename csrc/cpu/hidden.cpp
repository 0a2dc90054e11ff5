#include "hidden.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pages.h"
#include "softmax.h"

namespace kdfast {
namespace {

// Σ d² of a chunk with d = s − t, to which a bias is added and of which factor · d is kept where
// there is one of the two.
template <bool Biased, bool Kept, class Real>
KDFAST_CLONES Real squared_distance(const Real* s, const Real* t, const Real* bias, int64_t n,
                                    Real factor, Real* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real d = (Biased ? s[i] + bias[i] : s[i]) - t[i];
    sum += d * d;
    if (Kept) out[i] = factor * d;
  }
  return sum;
}

template <class Real>
struct Squares {
  Real student, teacher;
};

template <class Real>
KDFAST_CLONES Squares<Real> squares(const Real* s, const Real* t, int64_t n) {
  Real student = 0, teacher = 0;
#pragma omp simd reduction(+ : student, teacher)
  for (int64_t i = 0; i < n; ++i) {
    student += s[i] * s[i];
    teacher += t[i] * t[i];
  }
  return {student, teacher};
}

// Σ d² of a chunk with d = s − ratio · t.
template <class Real>
KDFAST_CLONES Real squared_distance_to(const Real* s, const Real* t, int64_t n, Real ratio) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real d = s[i] - ratio * t[i];
    sum += d * d;
  }
  return sum;
}

template <class Real>
KDFAST_CLONES void cosine_gradient(const Real* s, const Real* t, int64_t n, Real ratio, Real shrink,
                                   Real factor, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real d = s[i] - ratio * t[i];
    out[i] = factor * (d - shrink * s[i]);
  }
}

template <class T, class Real>
KDFAST_CLONES void round_to(const Real* in, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_real(in[i], out[i]);
}

// What one thread needs for a row: where what is not of the computation's precision is converted.
template <class Real>
struct Scratch {
  std::vector<Real> student, teacher, gradient;

  explicit Scratch(int64_t size) : student(size), teacher(size), gradient(size) {}
};

// Where a part of the gradient is computed: in its place, or in `buffer` to be rounded.
template <class Real>
Real* gradient_part(char* row, DType dtype, int64_t begin, Real* buffer) {
  const bool rounds = size_of(dtype) != sizeof(Real);
  return rounds ? buffer : reinterpret_cast<Real*>(row) + begin;
}

template <class Real>
void put(const Real* part, int64_t n, char* row, DType dtype, int64_t begin) {
  if (size_of(dtype) == sizeof(Real)) return;
  with_elements<Real>(row, dtype, [&](auto* elements) { round_to(part, n, elements + begin); });
}

// Calls `pair_loss(row, s, t, gradient, scratch)` for every row that counts, on all threads.
template <class Real, class PairLoss>
void all_rows(const HiddenRows<Real>& call, int64_t scratch_size, PairLoss pair_loss) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  if (rows == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, rows));
#pragma omp parallel num_threads(threads)
  {
    Scratch<Real> mine(scratch_size);
    // Rows that follow one another, as in kd_loss.cpp.
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t outer = row / call.inner_rows, inner = row % call.inner_rows;
      char* gradient = call.gradient.data ? call.gradient.row(outer, inner) : nullptr;
      if (call.mask.at(row, true)) {
        call.losses[row] = pair_loss(row, call.student.row(outer, inner),
                                     call.teacher.row(outer, inner), gradient, mine);
      } else {
        call.losses[row] = 0;
        if (gradient) std::memset(gradient, 0, call.width * size_of(call.gradient.dtype));
      }
    }
  }
}

}  // namespace

template <class Real>
void hidden_mse_rows(const HiddenRows<Real>& call, const Real* bias) {
  const double share = 1.0 / std::max<int64_t>(1, call.width);
  const bool kept = call.gradient.data != nullptr;
  const auto distance =
      bias ? (kept ? squared_distance<true, true, Real> : squared_distance<true, false, Real>)
           : (kept ? squared_distance<false, true, Real> : squared_distance<false, false, Real>);
  all_rows(call, kChunk,
           [&](int64_t row, const char* s_row, const char* t_row, char* gradient,
               Scratch<Real>& scratch) {
             // ∂ (s − t)² / ∂s = 2 (s − t).
             const Real factor = Real(2 * share * call.grad_scale.at(row, 1));
             double sum = 0;
             for (int64_t begin = 0; begin < call.width; begin += kChunk) {
               const int64_t n = std::min(kChunk, call.width - begin);
               const Real* s = load(s_row, call.student.dtype, begin, n, scratch.student.data());
               const Real* t = load(t_row, call.teacher.dtype, begin, n, scratch.teacher.data());
               Real* out = nullptr;
               if (gradient)
                 out = gradient_part(gradient, call.gradient.dtype, begin, scratch.gradient.data());
               sum += distance(s, t, bias ? bias + begin : nullptr, n, factor, out);
               if (gradient) put(out, n, gradient, call.gradient.dtype, begin);
             }
             return Real(sum * share);
           });
}

template <class Real>
void hidden_cosine_rows(const HiddenRows<Real>& call, double epsilon) {
  const int64_t width = call.width;
  all_rows(call, width,
           [&](int64_t row, const char* s_row, const char* t_row, char* gradient,
               Scratch<Real>& scratch) {
             const Real* s = load(s_row, call.student.dtype, 0, width, scratch.student.data());
             const Real* t = load(t_row, call.teacher.dtype, 0, width, scratch.teacher.data());
             const auto sum_over_chunks = [&](auto sum_of_chunk) {
               for (int64_t begin = 0; begin < width; begin += kChunk)
                 sum_of_chunk(begin, std::min(kChunk, width - begin));
             };
             double student = 0, teacher = 0;
             sum_over_chunks([&](int64_t begin, int64_t n) {
               const auto chunk = squares(s + begin, t + begin, n);
               student += chunk.student;
               teacher += chunk.teacher;
             });
             // A comparison that keeps NaN.
             const auto at_least = [&](double norm) { return norm < epsilon ? epsilon : norm; };
             const double student_norm = at_least(std::sqrt(student));
             const double teacher_norm = at_least(std::sqrt(teacher));

             // With a = s / ‖s‖ and b = t / ‖t‖, 1 − a·b = ½ ‖a − b‖² + ½ (1 − ‖a‖²) + ½ (1 −
             // ‖b‖²), and a − b = (s − ratio · t) / ‖s‖, which is 0 where student and teacher
             // agree.
             const Real ratio = Real(student_norm / teacher_norm);
             double distance = 0;
             sum_over_chunks([&](int64_t begin, int64_t n) {
               distance += squared_distance_to(s + begin, t + begin, n, ratio);
             });
             // Nothing but rounding, unless a norm is below epsilon.
             const auto shortfall = [&](double sum) {
               return std::sqrt(sum) < epsilon ? 1 - sum / (epsilon * epsilon) : 0;
             };
             const double inverse_square = 1 / (student_norm * student_norm);
             const double missing = shortfall(student);
             const double loss = (distance * inverse_square + missing + shortfall(teacher)) / 2;
             if (gradient) {
               // ∂L/∂s = (a − b − L · a) / ‖s‖; a norm below epsilon is a constant.
               const Real shrink = Real(missing > 0 ? 1 : loss);
               const Real factor = Real(inverse_square * call.grad_scale.at(row, 1));
               Real* out = gradient_part(gradient, call.gradient.dtype, 0, scratch.gradient.data());
               cosine_gradient(s, t, width, ratio, shrink, factor, out);
               put(out, width, gradient, call.gradient.dtype, 0);
             }
             return Real(loss);
           });
}

template void hidden_mse_rows(const HiddenRows<float>&, const float*);
template void hidden_mse_rows(const HiddenRows<double>&, const double*);
template void hidden_cosine_rows(const HiddenRows<float>&, double);
template void hidden_cosine_rows(const HiddenRows<double>&, double);

}  // namespace kdfast
