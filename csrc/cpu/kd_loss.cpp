#include "kd_loss.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "pages.h"
#include "softmax.h"

namespace kdfast {
namespace {

// Σ over a chunk of exp(x) for both sides, and of the KL's weighted difference of the two.
template <class Real>
struct ChunkSums {
  Real student, teacher, dot;
};

// student_exp = exp((s - student_shift) / T), likewise the teacher's, with their sums. For the two
// KLs also dot = Σ e · (difference of the scaled logits), out of which their value follows.
template <Divergence D, class Real>
KDFAST_CLONES ChunkSums<Real> exponentiate(const Real* s, const Real* t, int64_t n,
                                           Real student_shift, Real teacher_shift,
                                           Real student_scale, Real teacher_scale,
                                           Real* student_exp, Real* teacher_exp) {
  Real student_sum = 0, teacher_sum = 0, dot = 0;
#pragma omp simd reduction(+ : student_sum, teacher_sum, dot)
  for (int64_t i = 0; i < n; ++i) {
    const Real x = (s[i] - student_shift) * student_scale;
    const Real y = (t[i] - teacher_shift) * teacher_scale;
    const Real es = exp2_nonpositive(x);
    const Real et = exp2_nonpositive(y);
    student_exp[i] = es;
    teacher_exp[i] = et;
    student_sum += es;
    teacher_sum += et;
    // e > 0: an entry without probability contributes 0, not 0 * inf.
    if (D == Divergence::kForwardKl) dot += et > 0 ? et * (y - x) : Real(0);
    if (D == Divergence::kReverseKl) dot += es > 0 ? es * (x - y) : Real(0);
  }
  return {student_sum, teacher_sum, dot};
}

// KL(q‖p): f = g = q · (log q - log p). The student's exponentials become q, the teacher's become
// g. `log_ratio` is what the normalisers add to the difference of the scaled logits.
template <class Real>
KDFAST_CLONES void reverse_kl_terms(const Real* s, const Real* t, int64_t n, Real student_shift,
                                    Real teacher_shift, Real student_scale, Real teacher_scale,
                                    Real log_ratio, Real q_weight, Real* q_of_exp, Real* g_of_exp) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const Real x = (s[i] - student_shift) * student_scale;
    const Real y = (t[i] - teacher_shift) * teacher_scale;
    const Real q = q_of_exp[i] * q_weight;
    q_of_exp[i] = q;
    g_of_exp[i] = q > 0 ? q * ((x - y) * Real(kLn2) + log_ratio) : q;
  }
}

template <class Real>
struct Terms {
  Real f, g;
};

// Σ f and Σ g of a chunk for the divergences that need p and q side by side; f and g = q · ∂f/∂q
// are derived in docs/math.md. The student's exponentials become q and the teacher's become g.
template <Divergence D, class Real>
KDFAST_CLONES Terms<Real> paired_terms(int64_t n, Real p_weight, Real q_weight, Real teacher_share,
                                       Real student_share, Real* q_of_exp, Real* g_of_exp) {
  constexpr Real kTiny = std::numeric_limits<Real>::min();
  const Real log_share = std::log(student_share);
  Real f_sum = 0, g_sum = 0;
#pragma omp simd reduction(+ : f_sum, g_sum)
  for (int64_t i = 0; i < n; ++i) {
    const Real q = q_of_exp[i] * q_weight;
    const Real p = g_of_exp[i] * p_weight;
    Real f, g;
    if (D == Divergence::kTvd) {
      f = Real(0.5) * std::abs(p - q);
      g = p < q ? 0 * q : -q;
      g = p == q ? Real(-0.5) * q : g;
    } else {
      const Real mixture = teacher_share * p + student_share * q;
      // Below the smallest normal number, p and q are nothing and so is what they would contribute.
      const Real inverse = 1 / (mixture < kTiny ? kTiny : mixture);
      const Real p_ratio = p * inverse;
      const Real q_ratio = q * inverse;
      const Real difference = (p - q) * inverse;
      Real p_log_ratio = log_near_one(p_ratio, student_share * difference);
      p_log_ratio = p < kTiny ? Real(0) : p_log_ratio;

      // ∂f/∂q is wanted up to a constant: as log(student_share · q / m) it vanishes where the
      // teacher has no say, and the gradient is not the small difference of large terms there. As p
      // nears q, f wants log(q / m) instead. One logarithm of the better conditioned of the two
      // gives both.
      const Real teacher_part = teacher_share * p_ratio;
      const bool student_rules = p_ratio < Real(0.25);
      const Real log = log_near_one(student_rules ? student_share * q_ratio : q_ratio,
                                    student_rules ? -teacher_part : -teacher_share * difference);
      Real q_log_ratio = student_rules ? log - log_share : log;
      Real q_log_part = student_rules ? log : log + log_share;
      // But the reverse KL's ∂f/∂q has a second term, which all but takes the logarithm away until
      // the teacher's part is large.
      if (D == Divergence::kSkewReverseKl) {
        const Real exact = log_near_one(student_share * q_ratio, -teacher_part);
        q_log_part = teacher_part < Real(0.25) ? exact : q_log_part;
      }
      q_log_ratio = q < kTiny ? Real(0) : q_log_ratio;
      q_log_part = q < kTiny ? Real(0) : q_log_part;

      // m - p and m - q sum to 0, but for the rounding of the normalisers, which f without them
      // would feel in full. With them no entry of f is negative. In the JSD they cancel.
      if (D == Divergence::kJsd) {
        f = teacher_share * p * p_log_ratio + student_share * q * q_log_ratio;
        g = student_share * q * q_log_part;
      } else if (D == Divergence::kSkewForwardKl) {
        f = p * p_log_ratio - student_share * (p - q);
        g = -student_share * p * q_ratio;
      } else {
        f = q * q_log_ratio + teacher_share * (p - q);
        g = q * (q_log_part + teacher_part);
      }
    }
    f_sum += f;
    g_sum += g;
    q_of_exp[i] = q;
    g_of_exp[i] = g;
  }
  return {f_sum, g_sum};
}

// The gradient of a chunk is linear in what the scratch holds.
template <class Real>
struct Combination {
  const Real *g, *q, *hard;  // hard is null where it has no exponentials of its own
  Real by_g, by_q, by_hard;
};

template <class T, class Real>
KDFAST_CLONES void combine(const Combination<Real>& c, int64_t n, T* out) {
  if (c.hard) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      from_real(c.g[i] * c.by_g + c.q[i] * c.by_q + c.hard[i] * c.by_hard, out[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_real(c.g[i] * c.by_g + c.q[i] * c.by_q, out[i]);
  }
}

// At the label, if it is in this chunk, `at_label` is taken away before the one rounding.
template <class T, class Real>
void store_as(const Combination<Real>& c, int64_t n, int64_t label, Real at_label, T* out) {
  combine(c, n, out);
  if (label < 0) return;
  const Real hard = c.hard ? c.hard[label] * c.by_hard : Real(0);
  from_real(c.g[label] * c.by_g + c.q[label] * c.by_q + hard - at_label, out[label]);
}

void store(const Combination<float>& c, int64_t n, int64_t label, float at_label, char* out,
           DType dtype) {
  if (dtype == DType::kFloat32)
    store_as(c, n, label, at_label, reinterpret_cast<float*>(out));
  else if (dtype == DType::kBFloat16)
    store_as(c, n, label, at_label, reinterpret_cast<bfloat16*>(out));
  else
    store_as(c, n, label, at_label, reinterpret_cast<float16*>(out));
}

void store(const Combination<double>& c, int64_t n, int64_t label, double at_label, char* out,
           DType) {
  store_as(c, n, label, at_label, reinterpret_cast<double*>(out));
}

// What one thread needs for a row: its exponentials, and the shift that each chunk of them has.
template <class Real>
struct Scratch {
  std::vector<Real> student, teacher, hard;
  std::vector<Real> student_shift, teacher_shift;
  Real s_buffer[kChunk], t_buffer[kChunk];

  Scratch(int64_t vocab, bool separate_hard)
      : student(vocab),
        teacher(vocab),
        hard(separate_hard ? vocab : 0),
        student_shift((vocab + kChunk - 1) / kChunk),
        teacher_shift(student_shift.size()) {}
};

template <Divergence D, class Real>
void row_loss(const KdLossRows<Real>& call, int64_t outer, int64_t inner, Scratch<Real>& scratch) {
  const int64_t row = outer * call.inner_rows + inner;
  const int64_t rows = call.outer_rows * call.inner_rows;
  const int64_t vocab = call.vocab_size;
  const bool need_gradient = call.gradient.data != nullptr;
  const int64_t label = call.labels.at(row, 0);
  char* gradient_row = need_gradient ? call.gradient.row(outer, inner) : nullptr;
  const int64_t gradient_item = size_of(call.gradient.dtype);

  if (call.labels.data && label == call.ignore_index) {
    for (int part = 0; part < 3; ++part) call.losses[part * rows + row] = 0;
    if (need_gradient) std::memset(gradient_row, 0, call.width * gradient_item);
    return;
  }

  const char* student_row = call.student.row(outer, inner);
  const char* teacher_row = call.teacher.row(outer, inner);
  const Real temperature = call.temperature.at(row, 1);
  const bool hard_is_soft = temperature == 1;

  RunningSoftmax<Real> student{Real(kLog2E / temperature)};
  RunningSoftmax<Real> teacher{Real(kLog2E / call.teacher_temperature.at(row, 1))};
  double dot = 0, hard_sum = 0;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t n = std::min(kChunk, vocab - begin);
    const Real* s = load(student_row, call.student.dtype, begin, n, scratch.s_buffer);
    const Real* t = load(teacher_row, call.teacher.dtype, begin, n, scratch.t_buffer);

    const double teacher_before = teacher.sum, student_before = student.sum;
    const Real hard_before = student.shift();
    const double student_delta = student.raise_max(max_of(s, n));
    const double teacher_delta = teacher.raise_max(max_of(t, n));
    // The difference of the exponents moves with both. Nothing left to weigh: no 0 * inf.
    if (D == Divergence::kForwardKl)
      dot = teacher.decay == 0
                ? 0
                : teacher.decay * (dot + teacher_before * (teacher_delta - student_delta));
    if (D == Divergence::kReverseKl)
      dot = student.decay == 0
                ? 0
                : student.decay * (dot + student_before * (student_delta - teacher_delta));

    const auto sums =
        exponentiate<D>(s, t, n, student.shift(), teacher.shift(), student.scale, teacher.scale,
                        scratch.student.data() + begin, scratch.teacher.data() + begin);
    student.sum += sums.student;
    teacher.sum += sums.teacher;
    dot += sums.dot;
    scratch.student_shift[begin / kChunk] = student.shift();
    scratch.teacher_shift[begin / kChunk] = teacher.shift();
    if (call.need_hard && !hard_is_soft) {
      hard_sum *= std::exp(double(hard_before) - student.shift());
      hard_sum += exponentiate(s, n, student.shift(), Real(kLog2E), scratch.hard.data() + begin);
    }
  }
  if (hard_is_soft) hard_sum = student.sum;

  // What the exponentials of a chunk must be multiplied by to be probabilities.
  const auto weight_of = [](const RunningSoftmax<Real>& side, double sum, Real chunk_shift) {
    return std::exp2((double(chunk_shift) - side.shift()) * side.scale) / sum;
  };
  const auto q_weight = [&](int64_t chunk) {
    return weight_of(student, student.sum, scratch.student_shift[chunk]);
  };
  const auto p_weight = [&](int64_t chunk) {
    return weight_of(teacher, teacher.sum, scratch.teacher_shift[chunk]);
  };

  const double log_ratio = std::log(teacher.sum) - std::log(student.sum);
  double soft = 0, g_sum = 0;
  if (D == Divergence::kForwardKl) {
    soft = dot / teacher.sum * kLn2 - log_ratio;
    g_sum = -1;
  } else if (D == Divergence::kReverseKl) {
    soft = dot / student.sum * kLn2 + log_ratio;
    g_sum = soft;
  } else {
    const bool reverse = D == Divergence::kSkewReverseKl;
    const Real teacher_share = Real(reverse ? 1 - call.beta : call.beta);
    const Real student_share = Real(reverse ? call.beta : 1 - call.beta);
    for (int64_t begin = 0; begin < vocab; begin += kChunk) {
      const auto sums =
          paired_terms<D>(std::min(kChunk, vocab - begin), Real(p_weight(begin / kChunk)),
                          Real(q_weight(begin / kChunk)), teacher_share, student_share,
                          scratch.student.data() + begin, scratch.teacher.data() + begin);
      soft += sums.f;
      g_sum += sums.g;
    }
    // A NaN on either side is in its sum of exponentials, but not in the logarithm of a ratio.
    if (std::isnan(student.sum + teacher.sum)) soft = g_sum = student.sum + teacher.sum;
  }

  double hard = 0;
  if (call.need_hard) {
    const Real at_label = *load(student_row, call.student.dtype, label, 1, scratch.s_buffer);
    hard = std::log(hard_sum) - (double(at_label) - student.shift());
  }
  const double weight = call.token_weight.at(row, 1);
  const double t2 = call.scale_t2 ? double(temperature) * temperature : 1;
  // A share of 0 takes its term out, infinite or not.
  const double total = (call.alpha > 0 ? call.alpha * t2 * soft : 0) +
                       (call.alpha < 1 ? (1 - call.alpha) * hard : 0);
  call.losses[row] = Real(weight * total);
  call.losses[rows + row] = Real(weight * soft);
  call.losses[2 * rows + row] = Real(weight * hard);
  if (!need_gradient) return;

  // Nor is anything that the soft term may have of infinity looked at.
  const bool has_soft = call.alpha > 0;
  if (!has_soft) g_sum = 0;
  const double scale = weight * call.grad_scale.at(row, 1);
  const double soft_scale = scale * call.alpha * t2 / temperature;
  const double hard_scale = call.need_hard ? scale * (1 - call.alpha) : 0;
  const bool separate_hard = hard_scale != 0 && !hard_is_soft;
  for (int64_t begin = 0; begin < vocab; begin += kChunk) {
    const int64_t n = std::min(kChunk, vocab - begin);
    const int64_t chunk = begin / kChunk;
    // The scratch has exponentials still, or probabilities.
    const bool exponentials =
        D == Divergence::kForwardKl || (D == Divergence::kReverseKl && !has_soft);
    double by_g = soft_scale, by_q = -soft_scale * g_sum, by_hard = 0;
    if (D == Divergence::kForwardKl && has_soft) {
      by_g *= -p_weight(chunk);
      by_q *= q_weight(chunk);
    }
    if (D == Divergence::kReverseKl && has_soft) {
      reverse_kl_terms(load(student_row, call.student.dtype, begin, n, scratch.s_buffer),
                       load(teacher_row, call.teacher.dtype, begin, n, scratch.t_buffer), n,
                       student.shift(), teacher.shift(), student.scale, teacher.scale,
                       Real(log_ratio), Real(q_weight(chunk)), scratch.student.data() + begin,
                       scratch.teacher.data() + begin);
    }
    if (separate_hard) {
      by_hard =
          hard_scale * std::exp(double(scratch.student_shift[chunk]) - student.shift()) / hard_sum;
    } else {
      by_q += hard_scale * (exponentials ? q_weight(chunk) : 1);
    }

    const Combination<Real> combination{
        (has_soft ? scratch.teacher : scratch.student).data() + begin,
        scratch.student.data() + begin,
        separate_hard ? scratch.hard.data() + begin : nullptr,
        Real(by_g),
        Real(by_q),
        Real(by_hard)};
    const bool has_label = hard_scale != 0 && label >= begin && label < begin + n;
    store(combination, n, has_label ? label - begin : -1, Real(hard_scale),
          gradient_row + begin * gradient_item, call.gradient.dtype);
  }
  std::memset(gradient_row + vocab * gradient_item, 0, (call.width - vocab) * gradient_item);
}

template <Divergence D, class Real>
void all_rows(const KdLossRows<Real>& call) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, rows));
  std::vector<Scratch<Real>> scratch(threads, Scratch<Real>(call.vocab_size, call.need_hard));
#pragma omp parallel num_threads(threads)
  {
    Scratch<Real>& mine = scratch[thread_index()];
    // Each thread has rows that follow one another: two threads that touch a fresh page of 2 MiB
    // for the first time at once would both clear it (512 x 50257 float32: 22 ms, against 14).
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row)
      row_loss<D>(call, row / call.inner_rows, row % call.inner_rows, mine);
  }
}

}  // namespace

template <class Real>
void kd_loss_rows(const KdLossRows<Real>& call) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  if (rows == 0) return;
  if (call.gradient.data && call.gradient.data != call.student.data)
    prefer_huge_pages(call.gradient.data, rows * call.width * size_of(call.gradient.dtype));
  switch (call.divergence) {
    case Divergence::kForwardKl:
      return all_rows<Divergence::kForwardKl>(call);
    case Divergence::kReverseKl:
      return all_rows<Divergence::kReverseKl>(call);
    case Divergence::kJsd:
      return all_rows<Divergence::kJsd>(call);
    case Divergence::kSkewForwardKl:
      return all_rows<Divergence::kSkewForwardKl>(call);
    case Divergence::kSkewReverseKl:
      return all_rows<Divergence::kSkewReverseKl>(call);
    case Divergence::kTvd:
      return all_rows<Divergence::kTvd>(call);
  }
}

template void kd_loss_rows(const KdLossRows<float>&);
template void kd_loss_rows(const KdLossRows<double>&);

}  // namespace kdfast
