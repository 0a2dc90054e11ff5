#include "topk_kd_loss.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "pages.h"
#include "softmax.h"

namespace kdfast {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// p and q of an entry of the support, or of the bucket.
struct Pair {
  double log_p, log_q, p, q;
};

struct Terms {
  double f, g;
};

// f and g = q · ∂f/∂q, whose sums make the value and the gradient (docs/math.md).
Terms terms(Divergence divergence, const Pair& at, double beta) {
  // p > 0, q > 0: an entry without probability contributes 0, not 0 * inf.
  if (divergence == Divergence::kForwardKl)
    return {at.p > 0 ? at.p * (at.log_p - at.log_q) : at.p, -at.p};
  if (divergence == Divergence::kReverseKl) {
    const double f = at.q > 0 ? at.q * (at.log_q - at.log_p) : at.q;
    return {f, f};
  }
  const double mixture = beta * at.p + (1 - beta) * at.q;
  const double log_mixture = std::log(mixture == 0 ? 1 : mixture);
  const double from_p = at.p > 0 ? at.p * (at.log_p - log_mixture) : at.p;
  const double from_q = at.q > 0 ? at.q * (at.log_q - log_mixture) : at.q;
  // Below the smallest normal number q is nothing: p / q would overflow.
  const bool counts = at.q >= std::numeric_limits<double>::min();
  const double log_part = counts ? -std::log1p(beta * at.p / ((1 - beta) * at.q)) : 0;
  return {beta * from_p + (1 - beta) * from_q, (1 - beta) * at.q * log_part};
}

// out = 2^((x - shift) · scale). An entry of the support may exceed all that lies off it without
// bounds: what it gives is not looked at.
template <class Real>
KDFAST_CLONES void exponentiate_cut(const Real* x, int64_t n, Real shift, Real scale, Real* out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) out[i] = exp2_cut((x[i] - shift) * scale);
}

template <class Real>
struct Extent {
  Real sum, max;
};

template <class Real>
KDFAST_CLONES Extent<Real> extent_of(const Real* x, int64_t n) {
  Real sum = 0, max = 0;
#pragma omp simd reduction(+ : sum) reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    sum += x[i];
    max = x[i] > max ? x[i] : max;
  }
  return {sum, max};
}

// The gradient off the support: a share of one softmax, or of two.
template <class Real>
struct Shares {
  Real shift;
  Real scale, by_soft;
  Real hard_scale, by_hard;  // by_hard is 0 where the hard term has no softmax of its own

  Real at(Real logit) const {
    const Real x = logit - shift;
    return by_soft * exp2_cut(x * scale) + by_hard * exp2_cut(x * hard_scale);
  }
};

// Exponentials are taken once more: they cost less than to store them in L2 and to read them there.
template <class T, class Real>
KDFAST_CLONES void write_shares(const Real* x, const Shares<Real>& shares, int64_t n, T* out) {
  const auto [shift, scale, by_soft, hard_scale, by_hard] = shares;
  if (by_hard != 0) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      from_real(by_soft * exp2_cut((x[i] - shift) * scale) +
                    by_hard * exp2_cut((x[i] - shift) * hard_scale),
                out[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_real(by_soft * exp2_cut((x[i] - shift) * scale), out[i]);
  }
}

// The entries of a row that exist: where they are, and what the teacher and the student have there.
struct Support {
  std::vector<int64_t> column;
  std::vector<double> log_p, logit;
  std::vector<double> p, q, hard_q;  // not normalised
  std::vector<double> gradient;      // with respect to the student's logit
  int64_t size = 0;

  explicit Support(int64_t entries)
      : column(entries),
        log_p(entries),
        logit(entries),
        p(entries),
        q(entries),
        hard_q(entries),
        gradient(entries) {}
};

// What one thread needs for a row.
template <class Real>
struct Scratch {
  Support support;
  alignas(64) Real buffer[kChunk];
  alignas(64) Real exponentials[kChunk];

  explicit Scratch(int64_t entries) : support(entries) {}
};

template <class Real>
void read_entries(const TopkKdLossRows<Real>& call, int64_t row, Support& support) {
  support.size = 0;
  for (int64_t i = row * call.entries; i < (row + 1) * call.entries; ++i) {
    if (call.indices[i] < 0) continue;
    support.column[support.size] = call.indices[i];
    support.log_p[support.size++] = call.log_probs[i];
  }
}

// The softmax of what lies off the support, and its sum at temperature 1 where that is another.
template <class Real>
struct Outside {
  RunningSoftmax<Real> softmax;
  double hard_sum = 0;
};

// The sum and the maximum of a chunk's exponentials without those of its entries, in L1.
template <class Real>
Extent<Real> extent_outside(const Real* x, int64_t begin, int64_t n, int64_t first, int64_t last,
                            Real shift, Real scale, Scratch<Real>& scratch) {
  exponentiate_cut(x, n, shift, scale, scratch.exponentials);
  for (int64_t entry = first; entry < last; ++entry)
    scratch.exponentials[scratch.support.column[entry] - begin] = 0;
  return extent_of(scratch.exponentials, n);
}

// Leaves the entries out: their share is added in double, so that what is left of 1 beside them is
// a sum and no difference.
template <class Real>
Outside<Real> sweep(const TopkKdLossRows<Real>& call, const char* student, Real temperature,
                    bool separate_hard, Scratch<Real>& scratch) {
  Support& support = scratch.support;
  Outside<Real> outside{{Real(kLog2E / temperature)}};
  RunningSoftmax<Real>& softmax = outside.softmax;
  int64_t last = 0;
  for (int64_t begin = 0; begin < call.vocab_size; begin += kChunk) {
    const int64_t n = std::min(kChunk, call.vocab_size - begin);
    const Real* x = load(student, call.student.dtype, begin, n, scratch.buffer);
    const int64_t first = last;
    while (last < support.size && support.column[last] < begin + n) ++last;

    const auto extent = [&](Real scale) {
      return extent_outside(x, begin, n, first, last, softmax.shift(), scale, scratch);
    };
    const auto read_logits = [&] {
      for (int64_t entry = first; entry < last; ++entry)
        support.logit[entry] = x[support.column[entry] - begin];
    };
    if (begin > 0) {
      const Extent<Real> soft = extent(softmax.scale);
      const Extent<Real> hard = separate_hard ? extent(Real(kLog2E)) : Extent<Real>{0, 0};
      if (std::max(soft.max, hard.max) <= (1 << kMostBitsAboveMax) && softmax.sum > 0) {
        softmax.sum += soft.sum;
        outside.hard_sum += hard.sum;
        read_logits();
        continue;
      }
    }
    read_logits();
    if (x != scratch.buffer) std::copy(x, x + n, scratch.buffer);
    for (int64_t entry = first; entry < last; ++entry)
      scratch.buffer[support.column[entry] - begin] = -std::numeric_limits<Real>::infinity();
    x = scratch.buffer;
    const Real before = softmax.shift();
    softmax.raise_max(max_of(x, n));
    softmax.sum += extent(softmax.scale).sum;
    if (separate_hard) {
      // Nothing but -inf came before: there is nothing to rescale, and the factor may overflow.
      if (outside.hard_sum != 0) outside.hard_sum *= std::exp(double(before) - softmax.shift());
      outside.hard_sum += extent(Real(kLog2E)).sum;
    }
  }
  return outside;
}

// A softmax in two parts: the entries of the support, and the rest as one.
struct Split {
  double base, inverse_temperature;
  double outside;  // Σ exp((s - base) / T) off the support
  double total, log_total;
  double log_outside;  // of its share in the total

  double distance(double logit) const { return (logit - base) * inverse_temperature; }
};

// `outside_sum` is relative to `shift`. The entries' exponentials are left in `exponentials`.
Split split(const Support& support, double inverse_temperature, double shift, double outside_sum,
            std::vector<double>& exponentials) {
  double base = outside_sum == 0 ? -kInfinity : shift;
  for (int64_t j = 0; j < support.size; ++j) base = std::max(base, support.logit[j]);
  if (base == -kInfinity) base = 0;
  Split split{base, inverse_temperature, 0, 0, 0, -kInfinity};
  if (outside_sum != 0) split.outside = outside_sum * std::exp(split.distance(shift));
  split.total = split.outside;
  for (int64_t j = 0; j < support.size; ++j) {
    exponentials[j] = std::exp(split.distance(support.logit[j]));
    split.total += exponentials[j];
  }
  split.log_total = std::log(split.total);
  if (outside_sum != 0)
    split.log_outside = std::log(outside_sum) + split.distance(shift) - split.log_total;
  return split;
}

// The soft term, with its gradient in the scaled logits: the support's per entry, the rest's as a
// whole, of which each column takes its part.
struct SoftTerm {
  double value, outside_gradient;
};

template <class Real>
SoftTerm soft_term(const TopkKdLossRows<Real>& call, const Split& student, Support& support) {
  // The teacher's p, and log Σp.
  double max = -kInfinity, sum = 0;
  for (int64_t j = 0; j < support.size; ++j) max = std::max(max, support.log_p[j]);
  const double shift = max == -kInfinity ? 0 : max;
  for (int64_t j = 0; j < support.size; ++j) {
    support.p[j] = std::exp(support.log_p[j] - shift);
    sum += support.p[j];
  }
  const double log_mass = shift + std::log(sum);
  const bool renormalized = call.tail == Tail::kRenormalize || call.tail == Tail::kSupport;
  const double log_factor = renormalized ? -log_mass : 0;
  const double factor = std::exp(shift + log_factor);

  double value = 0, g_sum = 0;
  for (int64_t j = 0; j < support.size; ++j) {
    const Pair pair{support.log_p[j] + log_factor,
                    student.distance(support.logit[j]) - student.log_total, support.p[j] * factor,
                    support.q[j] / student.total};
    const Terms of_entry = terms(call.divergence, pair, call.beta);
    value += of_entry.f;
    g_sum += of_entry.g;
    support.gradient[j] = of_entry.g;
  }
  double outside_gradient = 0;
  const double outside_q = std::exp(student.log_outside);
  if (call.tail == Tail::kBucket) {
    // What rounding makes 1 or more leaves nothing, and so does a support that leaves no column, or
    // none that the student has: what is left of the teacher there may be rounding too.
    const double rest = -std::expm1(log_mass);
    const bool rounded =
        student.log_outside == -kInfinity && rest <= call.entries * call.smallest_bucket;
    const bool nothing = log_mass >= 0 || support.size == call.vocab_size || rounded;
    const double p = nothing ? 0 : rest;
    double log_p = std::log(p);
    if (nothing && call.divergence == Divergence::kReverseKl)
      log_p = std::log(call.smallest_bucket);
    const Pair pair{log_p, student.log_outside, p, outside_q};
    const Terms of_bucket = terms(call.divergence, pair, call.beta);
    value += of_bucket.f;
    g_sum += of_bucket.g;
    outside_gradient = of_bucket.g;
  }
  // Comparisons swallow a NaN of either side, and a row without any probability.
  if (std::isnan(log_mass) || !(student.total > 0) || (renormalized && log_mass == -kInfinity))
    value = g_sum = kNaN;
  for (int64_t j = 0; j < support.size; ++j)
    support.gradient[j] -= support.q[j] / student.total * g_sum;
  if (call.tail != Tail::kSupport) outside_gradient -= outside_q * g_sum;
  return {value, outside_gradient};
}

template <class Real>
void row_loss(const TopkKdLossRows<Real>& call, int64_t row, Scratch<Real>& scratch) {
  const int64_t outer = row / call.inner_rows, inner = row % call.inner_rows;
  const int64_t rows = call.outer_rows * call.inner_rows;
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
  const Real temperature = call.temperature.at(row, 1);
  const bool separate_hard = call.need_hard && temperature != 1;
  Support& support = scratch.support;
  read_entries(call, row, support);
  // The labels' logit, before the gradient takes its place.
  double label_logit = 0;
  if (call.need_hard)
    label_logit = *load(student_row, call.student.dtype, label, 1, scratch.buffer);

  Outside<Real> outside{{Real(kLog2E / temperature)}};
  if (call.tail != Tail::kSupport || call.need_hard) {
    outside = sweep(call, student_row, temperature, separate_hard, scratch);
  } else {
    for (int64_t j = 0; j < support.size; ++j)
      support.logit[j] =
          *load(student_row, call.student.dtype, support.column[j], 1, scratch.buffer);
  }
  const double shift = outside.softmax.shift();
  // Of the scale that the exponentials were taken with, which float32 rounded.
  const double inverse_temperature = double(outside.softmax.scale) * kLn2;
  const double soft_sum = call.tail == Tail::kSupport ? 0 : outside.softmax.sum;
  const Split soft_split = split(support, inverse_temperature, shift, soft_sum, support.q);
  const SoftTerm soft = soft_term(call, soft_split, support);
  Split hard_split{};
  if (separate_hard)
    hard_split = split(support, 1, shift, outside.hard_sum, support.hard_q);
  else if (call.need_hard)
    hard_split = split(support, inverse_temperature, shift, outside.softmax.sum, support.hard_q);
  const double hard = call.need_hard ? hard_split.log_total - hard_split.distance(label_logit) : 0;
  const double weight = call.token_weight.at(row, 1);
  const double t2 = call.scale_t2 ? double(temperature) * temperature : 1;
  // A share of 0 takes its term out, infinite or not.
  const double total = (call.alpha > 0 ? call.alpha * t2 * soft.value : 0) +
                       (call.alpha < 1 ? (1 - call.alpha) * hard : 0);
  call.losses[row] = Real(weight * total);
  call.losses[rows + row] = Real(weight * soft.value);
  call.losses[2 * rows + row] = Real(weight * hard);
  if (!need_gradient) return;

  const double scale = weight * call.grad_scale.at(row, 1);
  const double soft_scale = scale * call.alpha * t2 / temperature;
  const double hard_scale = call.need_hard ? scale * (1 - call.alpha) : 0;
  for (int64_t j = 0; j < support.size; ++j) {
    double& gradient = support.gradient[j];
    gradient = call.alpha > 0 ? soft_scale * gradient : 0;
    if (hard_scale == 0) continue;
    gradient += hard_scale * support.hard_q[j] / hard_split.total;
    if (support.column[j] == label) gradient -= hard_scale;
  }
  // Of all columns off the support together.
  double outside_gradient = call.alpha > 0 ? soft_scale * soft.outside_gradient : 0;
  if (hard_scale != 0 && !separate_hard)
    outside_gradient += hard_scale * hard_split.outside / hard_split.total;

  with_elements<Real>(gradient_row, call.gradient.dtype, [&](auto* gradient) {
    if (call.tail == Tail::kSupport && hard_scale == 0) {
      std::memset(gradient_row, 0, call.width * gradient_item);
      for (int64_t j = 0; j < support.size; ++j)
        from_real(Real(support.gradient[j]), gradient[support.column[j]]);
      return;
    }
    Shares<Real> shares{Real(shift), outside.softmax.scale, 0, Real(kLog2E), 0};
    if (outside.softmax.sum != 0) shares.by_soft = Real(outside_gradient / outside.softmax.sum);
    if (separate_hard && hard_scale != 0 && outside.hard_sum != 0)
      shares.by_hard = Real(hard_scale * std::exp(shift - hard_split.base) / hard_split.total);
    int64_t entry = 0;
    for (int64_t begin = 0; begin < call.vocab_size; begin += kChunk) {
      const int64_t n = std::min(kChunk, call.vocab_size - begin);
      const Real* x = load(student_row, call.student.dtype, begin, n, scratch.buffer);
      write_shares(x, shares, n, gradient + begin);
      if (hard_scale != 0 && label >= begin && label < begin + n)
        from_real(shares.at(Real(label_logit)) - Real(hard_scale), gradient[label]);
      for (; entry < support.size && support.column[entry] < begin + n; ++entry)
        from_real(Real(support.gradient[entry]), gradient[support.column[entry]]);
    }
    std::memset(gradient_row + call.vocab_size * gradient_item, 0,
                (call.width - call.vocab_size) * gradient_item);
  });
}

}  // namespace

template <class Real>
void topk_kd_loss_rows(const TopkKdLossRows<Real>& call) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  if (rows == 0) return;
  if (call.gradient.data && call.gradient.data != call.student.data)
    prefer_huge_pages(call.gradient.data, rows * call.width * size_of(call.gradient.dtype));
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, rows));
  std::vector<Scratch<Real>> scratch(threads, Scratch<Real>(call.entries));
#pragma omp parallel num_threads(threads)
  {
    Scratch<Real>& mine = scratch[thread_index()];
    // Rows that follow one another: two threads that touch a fresh page of 2 MiB at once would both
    // clear it.
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) row_loss(call, row, mine);
  }
}

template void topk_kd_loss_rows(const TopkKdLossRows<float>&);
template void topk_kd_loss_rows(const TopkKdLossRows<double>&);

}  // namespace kdfast
