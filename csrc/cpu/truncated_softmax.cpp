#include "truncated_softmax.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "softmax.h"

namespace kdfast {
namespace {

// Every kGroups-th element of a chunk makes a group, so that their maxima are taken lane by lane.
constexpr int64_t kGroups = 128;

// Every kFolds-th group of a row makes a fold, whose maxima bound the k-th largest from below.
constexpr int64_t kFolds = 1024;

// Groups that are passed over together.
constexpr int64_t kBlock = 16;

template <class Real>
constexpr Real kLowest = -std::numeric_limits<Real>::infinity();

// Integers in the order of the logits, and back: to select among them needs no branch on the data,
// which a processor would guess wrong half of the time.
KDFAST_INLINE int32_t ordered_key(float logit) {
  const int32_t bits = static_cast<int32_t>(bits_of(logit + 0.f));  // -0 is 0
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

KDFAST_INLINE int64_t ordered_key(double logit) {
  int64_t bits;
  logit += 0.;
  std::memcpy(&bits, &logit, sizeof bits);
  return bits ^ ((bits >> 63) & 0x7fffffffffffffff);
}

KDFAST_INLINE float logit_of(int32_t key) {
  return float_from_bits(static_cast<uint32_t>(key ^ ((key >> 31) & 0x7fffffff)));
}

KDFAST_INLINE double logit_of(int64_t key) {
  key ^= (key >> 63) & 0x7fffffffffffffff;
  double logit;
  std::memcpy(&logit, &key, sizeof logit);
  return logit;
}

template <class Key>
KDFAST_CLONES int64_t count_at_least(const Key* keys, int64_t n, Key least) {
  Key count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= least;
  return count;
}

template <class Real>
KDFAST_CLONES Real sum_exponentials(const Real* x, int64_t n, Real shift, Real scale) {
  Real sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += exp2_cut((x[i] - shift) * scale);
  return sum;
}

// The groups' maxima of a chunk as keys; returns the largest.
template <class Real, class Key>
KDFAST_CLONES Key max_of_groups(const Real* chunk, Key* keys) {
  Real maxima[kGroups];
  std::fill(maxima, maxima + kGroups, kLowest<Real>);
  for (int64_t begin = 0; begin < kChunk; begin += kGroups) {
#pragma omp simd
    for (int64_t group = 0; group < kGroups; ++group) {
      const Real logit = chunk[begin + group];
      maxima[group] = logit > maxima[group] ? logit : maxima[group];
    }
  }
  Key max = std::numeric_limits<Key>::min();
#pragma omp simd reduction(max : max)
  for (int64_t group = 0; group < kGroups; ++group) {
    keys[group] = ordered_key(maxima[group]);
    max = keys[group] > max ? keys[group] : max;
  }
  return max;
}

// The maxima of the folds.
template <class Key>
KDFAST_CLONES void fold(const Key* keys, int64_t n, Key* folds) {
  std::fill(folds, folds + kFolds, std::numeric_limits<Key>::min());
  for (int64_t begin = 0; begin < n; begin += kFolds) {
    const int64_t last = std::min(kFolds, n - begin);
#pragma omp simd
    for (int64_t i = 0; i < last; ++i)
      folds[i] = keys[begin + i] > folds[i] ? keys[begin + i] : folds[i];
  }
}

// Which of n keys, a multiple of kBlock, are at least `least`; returns how many.
template <class Key>
KDFAST_CLONES int64_t find_at_least(const Key* keys, int64_t n, Key least, Key* found,
                                    int64_t* where) {
  int64_t count = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    int any = 0;
#pragma omp simd reduction(| : any)
    for (int64_t i = begin; i < begin + kBlock; ++i) any |= keys[i] >= least;
    if (!any) continue;
    for (int64_t i = begin; i < begin + kBlock; ++i) {
      found[count] = keys[i];
      where[count] = i;
      count += keys[i] >= least;
    }
  }
  return count;
}

template <class Key>
KDFAST_CLONES Key max_key(const Key* keys, int64_t n) {
  Key max = std::numeric_limits<Key>::min();
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = keys[i] > max ? keys[i] : max;
  return max;
}

// The k-th largest of n keys that are at least `low`, by bisection.
template <class Key>
Key kth_largest(const Key* keys, int64_t n, int64_t k, Key low) {
  using Unsigned = std::make_unsigned_t<Key>;
  Key high = max_key(keys, n);
  while (low < high) {
    const Unsigned half = (static_cast<Unsigned>(high) - static_cast<Unsigned>(low)) / 2;
    const Key middle = static_cast<Key>(static_cast<Unsigned>(high) - half);
    if (count_at_least(keys, n, middle) >= k)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// What one thread needs for a row.
template <class Real>
struct Scratch {
  using Key = decltype(ordered_key(Real()));

  struct Entry {
    Key key;
    int64_t column;

    // Largest first, and of equal logits the lower column.
    bool operator<(const Entry& other) const {
      return key > other.key || (key == other.key && column < other.column);
    }
  };

  alignas(64) Real buffer[kChunk];
  Key folds[kFolds];
  const int64_t all_groups;
  // Of every group, and of the candidates. They are as long as the row, for a row of equal logits,
  // and their pages are hardly ever touched: nothing may clear them.
  std::unique_ptr<Key[]> group_keys, keys;
  std::unique_ptr<int64_t[]> groups, columns, ties;
  std::vector<Entry> largest;

  Scratch(int64_t vocab, int64_t k)
      : all_groups((vocab + kChunk - 1) / kChunk * kGroups),
        group_keys(new Key[all_groups]),
        keys(new Key[all_groups / kGroups * kChunk + 1]),
        groups(new int64_t[all_groups + 1]),
        columns(new int64_t[all_groups / kGroups * kChunk + 1]),
        ties(new int64_t[all_groups / kGroups * kChunk + 1]),
        largest(k) {}
};

// The k largest of a row in order, into `scratch.largest`. k groups have a maximum at least as
// large as the k-th largest maximum, so k elements are, and all of the k largest are in these
// groups: no others are looked at again.
template <class T, class Real>
void select(const T* row, int64_t vocab, int64_t k, Scratch<Real>& scratch) {
  using Key = typename Scratch<Real>::Key;
  const Key lowest = ordered_key(kLowest<Real>);
  Key* keys = scratch.keys.get();
  int64_t* columns = scratch.columns.get();
  int64_t* ties = scratch.ties.get();

  // A bound by the folds, of which k hold an element each that is at least as large, leaves few
  // groups for the next.
  Key least = lowest + 1;
  if (k <= kFolds) {
    fold(scratch.group_keys.get(), scratch.all_groups, scratch.folds);
    least = std::max(least, kth_largest(scratch.folds, kFolds, k, lowest));
  }
  const int64_t groups = find_at_least(scratch.group_keys.get(), scratch.all_groups, least, keys,
                                       scratch.groups.get());
  if (groups > k) least = kth_largest(keys, groups, k, least);

  int64_t count = 0;
  for (int64_t hit = 0; hit < groups; ++hit) {
    const int64_t group = scratch.groups[hit];
    if (scratch.group_keys[group] < least) continue;
    const int64_t begin = group / kGroups * kChunk;
    const int64_t end = std::min(begin + kChunk, vocab);
    for (int64_t column = begin + group % kGroups; column < end; column += kGroups) {
      const Key key = ordered_key(to_real(row[column]));
      keys[count] = key;
      columns[count] = column;
      count += key >= least;
    }
  }
  // There are not as many besides -inf.
  for (int64_t column = 0; count < k; ++column) {
    keys[count] = lowest;
    columns[count] = column;
    count += ordered_key(to_real(row[column])) == lowest;
  }

  const Key last = kth_largest(keys, count, k, lowest);
  int64_t kept = 0, tied = 0;
  for (int64_t i = 0; i < count; ++i) {
    ties[tied] = columns[i];
    tied += keys[i] == last;
    if (keys[i] > last) scratch.largest[kept++] = {keys[i], columns[i]};
  }
  if (kept + tied > k) std::nth_element(ties, ties + (k - kept), ties + tied);
  for (int64_t i = kept; i < k; ++i) scratch.largest[i] = {last, ties[i - kept]};
  std::sort(scratch.largest.begin(), scratch.largest.end());
}

// Takes a chunk of n elements, padded to kChunk with -inf, into the row's softmax. Its exponentials
// come first: what they compute hides what they wait for.
template <class Real, class Key>
void take(const Real* chunk, int64_t n, Key* keys, RunningSoftmax<Real>& softmax) {
  const Real sum = sum_exponentials(chunk, n, softmax.shift(), softmax.scale);
  const Real max = logit_of(max_of_groups(chunk, keys));
  const bool near = (double(max) - softmax.max) * softmax.scale <= kMostBitsAboveMax;
  if (softmax.sum > 0 && near) {
    softmax.sum += sum;
  } else {
    softmax.raise_max(max);
    softmax.sum += sum_exponentials(chunk, n, softmax.shift(), softmax.scale);
  }
}

template <class Real>
void row_softmax(const TruncatedSoftmaxRows<Real>& call, int64_t row, Scratch<Real>& scratch) {
  char* logits = call.logits.row(row / call.inner_rows, row % call.inner_rows);
  const Real temperature = call.temperature.at(row, 1);
  Real* log_probs = call.log_probs + row * call.k;
  int64_t* indices = call.indices + row * call.k;

  RunningSoftmax<Real> softmax{Real(kLog2E / temperature)};
  for (int64_t begin = 0; begin < call.vocab_size; begin += kChunk) {
    const int64_t n = std::min(kChunk, call.vocab_size - begin);
    const Real* x = load(logits, call.logits.dtype, begin, n, scratch.buffer);
    if (n < kChunk) {
      if (x != scratch.buffer) std::copy(x, x + n, scratch.buffer);
      std::fill(scratch.buffer + n, scratch.buffer + kChunk, kLowest<Real>);
      x = scratch.buffer;
    }
    take(x, n, scratch.group_keys.get() + begin / kChunk * kGroups, softmax);
  }

  // NaN, +inf, or nothing but -inf: there is no softmax.
  if (!(softmax.sum > 0)) {
    std::fill(log_probs, log_probs + call.k, std::numeric_limits<Real>::quiet_NaN());
    for (int64_t i = 0; i < call.k; ++i) indices[i] = i;
    return;
  }
  with_elements<Real>(logits, call.logits.dtype, [&](const auto* elements) {
    select(elements, call.vocab_size, call.k, scratch);
  });
  const double log_sum = std::log(softmax.sum);
  for (int64_t i = 0; i < call.k; ++i) {
    const auto& entry = scratch.largest[i];
    const double distance = double(logit_of(entry.key)) - softmax.shift();
    log_probs[i] = Real(distance / temperature - log_sum);
    indices[i] = entry.column;
  }
}

}  // namespace

template <class Real>
void truncated_softmax_rows(const TruncatedSoftmaxRows<Real>& call) {
  const int64_t rows = call.outer_rows * call.inner_rows;
  if (rows == 0) return;
  const int threads = static_cast<int>(std::min<int64_t>(call.threads, rows));
#pragma omp parallel num_threads(threads)
  {
    Scratch<Real> mine(call.vocab_size, call.k);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) row_softmax(call, row, mine);
  }
}

template void truncated_softmax_rows(const TruncatedSoftmaxRows<float>&);
template void truncated_softmax_rows(const TruncatedSoftmaxRows<double>&);

}  // namespace kdfast
