#include "hidden.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#include "pages.h"
#include "softmax.h"

namespace kdfast {
namespace {

// Elements are of type E, and computed with in Real.

// Σ d² of a chunk with d = s − t, to which a bias is added and of which factor · d is kept where
// there is one of the two.
template <bool Biased, bool Kept, class Real, class E>
KDFAST_CLONES Real squared_distance(const E* s, const E* t, const Real* bias, int64_t n,
                                    Real factor, E* out) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real student = to_real(s[i]);
    const Real d = (Biased ? student + bias[i] : student) - to_real(t[i]);
    sum += d * d;
    if (Kept) from_real(factor * d, out[i]);
  }
  return sum;
}

template <class Real>
struct Squares {
  Real student, teacher;
};

template <class Real, class E>
KDFAST_CLONES Squares<Real> squares(const E* s, const E* t, int64_t n) {
  Real student = 0, teacher = 0;
#pragma omp simd reduction(+ : student, teacher)
  for (int64_t i = 0; i < n; ++i) {
    student += to_real(s[i]) * to_real(s[i]);
    teacher += to_real(t[i]) * to_real(t[i]);
  }
  return {student, teacher};
}

// Σ d² of a chunk with d = s − ratio · t.
template <class Real, class E>
KDFAST_CLONES Real squared_distance_to(const E* s, const E* t, int64_t n, Real ratio) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real d = to_real(s[i]) - ratio * to_real(t[i]);
    sum += d * d;
  }
  return sum;
}

template <class Real, class E>
KDFAST_CLONES void cosine_gradient(const E* s, const E* t, int64_t n, Real ratio, Real shrink,
                                   Real factor, E* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real student = to_real(s[i]);
    const Real d = student - ratio * to_real(t[i]);
    from_real(factor * (d - shrink * student), out[i]);
  }
}

template <class T, class Real>
KDFAST_CLONES void round_to(const Real* in, int64_t n, T* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) from_real(in[i], out[i]);
}

// Parts of two rows and of the gradient as arrays of E. Where the tensors are not all of that type
// it is Real, and one of another type is converted.
template <class Real, class E>
class Parts {
 public:
  Parts(const HiddenRows<Real>& call, int64_t size) : call_(call) {
    if (converts(call.student)) student_.resize(size);
    if (converts(call.teacher)) teacher_.resize(size);
    if (call.gradient.data && converts(call.gradient)) gradient_.resize(size);
  }

  const E* student(const char* row, int64_t begin, int64_t n) {
    return part(row, call_.student, begin, n, student_);
  }

  const E* teacher(const char* row, int64_t begin, int64_t n) {
    return part(row, call_.teacher, begin, n, teacher_);
  }

  // Where the gradient is computed, which `put` leaves in its place.
  E* gradient(char* row, int64_t begin) {
    return gradient_.empty() ? reinterpret_cast<E*>(row) + begin : gradient_.data();
  }

  void put(char* row, int64_t begin, int64_t n) {
    if constexpr (std::is_same_v<E, Real>) {
      if (gradient_.empty()) return;
      with_elements<Real>(row, call_.gradient.dtype,
                          [&](auto* all) { round_to(gradient_.data(), n, all + begin); });
    }
  }

 private:
  static bool converts(const Matrix& matrix) {
    return size_of(matrix.dtype) != static_cast<int64_t>(sizeof(E));
  }

  static const E* part(const char* row, const Matrix& matrix, int64_t begin, int64_t n,
                       std::vector<E>& buffer) {
    if constexpr (std::is_same_v<E, Real>) {
      if (!buffer.empty()) return load(row, matrix.dtype, begin, n, buffer.data());
    }
    return reinterpret_cast<const E*>(row) + begin;
  }

  const HiddenRows<Real>& call_;
  std::vector<E> student_, teacher_, gradient_;
};

// Calls `pair_loss(row, s, t, gradient, parts)` for every row that counts, on all threads.
template <class Real, class E, class PairLoss>
void all_rows(const HiddenRows<Real>& call, int64_t part_size, PairLoss pair_loss) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  if (rows == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, rows));
#pragma omp parallel num_threads(threads)
  {
    Parts<Real, E> mine(call, part_size);
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

template <class E, class Real>
void mse_rows(const HiddenRows<Real>& call, const Real* bias) {
  const double share = 1.0 / std::max<int64_t>(1, call.width);
  const bool kept = call.gradient.data != nullptr;
  const auto distance =
      bias ? (kept ? squared_distance<true, true, Real, E> : squared_distance<true, false, Real, E>)
           : (kept ? squared_distance<false, true, Real, E>
                   : squared_distance<false, false, Real, E>);
  all_rows<Real, E>(call, kChunk,
                    [&](int64_t row, const char* s_row, const char* t_row, char* gradient,
                        Parts<Real, E>& parts) {
                      // ∂ (s − t)² / ∂s = 2 (s − t).
                      const Real factor = Real(2 * share * call.grad_scale.at(row, 1));
                      double sum = 0;
                      for (int64_t begin = 0; begin < call.width; begin += kChunk) {
                        const int64_t n = std::min(kChunk, call.width - begin);
                        const E* s = parts.student(s_row, begin, n);
                        const E* t = parts.teacher(t_row, begin, n);
                        E* out = gradient ? parts.gradient(gradient, begin) : nullptr;
                        sum += distance(s, t, bias ? bias + begin : nullptr, n, factor, out);
                        if (gradient) parts.put(gradient, begin, n);
                      }
                      return Real(sum * share);
                    });
}

template <class E, class Real>
void cosine_rows(const HiddenRows<Real>& call, double epsilon) {
  const int64_t width = call.width;
  all_rows<Real, E>(
      call, width,
      [&](int64_t row, const char* s_row, const char* t_row, char* gradient,
          Parts<Real, E>& parts) {
        const E* s = parts.student(s_row, 0, width);
        const E* t = parts.teacher(t_row, 0, width);
        const auto sum_over_chunks = [&](auto sum_of_chunk) {
          for (int64_t begin = 0; begin < width; begin += kChunk)
            sum_of_chunk(begin, std::min(kChunk, width - begin));
        };
        double student = 0, teacher = 0;
        sum_over_chunks([&](int64_t begin, int64_t n) {
          const auto chunk = squares<Real>(s + begin, t + begin, n);
          student += chunk.student;
          teacher += chunk.teacher;
        });
        // A comparison that keeps NaN.
        const auto at_least = [&](double norm) { return norm < epsilon ? epsilon : norm; };
        const double student_norm = at_least(std::sqrt(student));
        const double teacher_norm = at_least(std::sqrt(teacher));

        // With a = s / ‖s‖ and b = t / ‖t‖, 1 − a·b = ½ ‖a − b‖² + ½ (1 − ‖a‖²) + ½ (1 − ‖b‖²),
        // and a − b = (s − ratio · t) / ‖s‖, which is 0 where student and teacher agree.
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
          cosine_gradient(s, t, width, ratio, shrink, factor, parts.gradient(gradient, 0));
          parts.put(gradient, 0, width);
        }
        return Real(loss);
      });
}

// Calls `function` with a pointer to bfloat16 where that is the type of all tensors: to read it and
// to round to it where it is used takes less than a copy in float32. Else with one to Real; a
// float16 is converted once, because that takes a dozen operations.
template <class Real, class Function>
void with_elements_of(const HiddenRows<Real>& call, Function function) {
  const auto is_bfloat16 = [](const Matrix& matrix) { return matrix.dtype == DType::kBFloat16; };
  if constexpr (std::is_same_v<Real, float>) {
    if (is_bfloat16(call.student) && is_bfloat16(call.teacher) &&
        (call.gradient.data == nullptr || is_bfloat16(call.gradient)))
      return function(static_cast<bfloat16*>(nullptr));
  }
  function(static_cast<Real*>(nullptr));
}

}  // namespace

template <class Real>
void hidden_mse_rows(const HiddenRows<Real>& call, const Real* bias) {
  with_elements_of(call, [&](auto* elements) {
    mse_rows<std::remove_pointer_t<decltype(elements)>>(call, bias);
  });
}

template <class Real>
void hidden_cosine_rows(const HiddenRows<Real>& call, double epsilon) {
  with_elements_of(call, [&](auto* elements) {
    cosine_rows<std::remove_pointer_t<decltype(elements)>>(call, epsilon);
  });
}

template void hidden_mse_rows(const HiddenRows<float>&, const float*);
template void hidden_mse_rows(const HiddenRows<double>&, const double*);
template void hidden_cosine_rows(const HiddenRows<float>&, double);
template void hidden_cosine_rows(const HiddenRows<double>&, double);

}  // namespace kdfast
