// The kernel of kd_loss in which a cluster of blocks holds a row pair. docs/math.md derives the
// terms, docs/performance.md the sizes; kernels/kd_loss.py is the same without clusters.
#pragma once

// In angle brackets: a test puts a device of its own in this one's place.
#include <cmath>
#include <device.cuh>

#include "kd_loss.h"

namespace kdfast {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kInfinity = INFINITY;

// The start of a running maximum: finite, so that a logit of -inf minus it is -inf and never NaN.
constexpr float kLowest = -3.4028234663852886e38f;

// In bits: float32 does not see a probability beside another that is 2^kWidest times larger.
constexpr float kWidest = 120.f;

constexpr int kWarps = kThreads / kLanes;

// The types of both sides: one that they share, known when the kernel is compiled, or any.
enum class Elements { kFloat32, kBFloat16, kFloat16, kMixed };

template <Elements E>
KDFAST_DEVICE constexpr DType type_of(DType at_run_time) {
  return E == Elements::kFloat32    ? DType::kFloat32
         : E == Elements::kBFloat16 ? DType::kBFloat16
         : E == Elements::kFloat16  ? DType::kFloat16
                                    : at_run_time;
}

// The columns that a thread takes at a time: 16 bytes of the wider side.
template <Elements E>
constexpr int kWindow = E == Elements::kBFloat16 || E == Elements::kFloat16 ? 8 : 4;

KDFAST_DEVICE int bytes_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

KDFAST_DEVICE char* row_of(const Matrix& matrix, int64_t outer, int64_t inner) {
  const int64_t elements = outer * matrix.outer_stride + inner * matrix.inner_stride;
  return matrix.data + elements * bytes_of(matrix.dtype);
}

KDFAST_DEVICE float value_at(const RowValues& values, int64_t row) {
  return values.data ? values.data[row * values.step] : values.otherwise;
}

// How many columns would fit between the 16-byte boundary at or before a column and the column.
KDFAST_DEVICE int pad_before(const char* column, DType dtype) {
  return int(reinterpret_cast<uintptr_t>(column) % 16) / bytes_of(dtype);
}

// What a thread, then a warp, then a block and then the cluster knows of a row: maxima, and sums
// relative to them. What the sums are used for wants the difference of the first two to their last
// digits: they are joined in float64.
struct alignas(16) Statistics {
  double student_sum = 0, teacher_sum = 0;
  float student_max = kLowest, teacher_max = kLowest;
  float dot = 0;  // Σ e · (difference of the scaled logits), for the plain KLs
  float hard_sum = 0;
};

struct alignas(16) TermSums {
  double f = 0, g = 0;
};

// Every warp of the cluster leaves what it knows in every block.
struct Exchange {
  CopyBarrier arrived[kMostChunks];
  CopyBarrier statistics_arrived, terms_arrived;
  Statistics statistics[kMostClusterBlocks * kWarps];
  TermSums terms[kMostClusterBlocks * kWarps];
};

// A side's share of a row: where it begins in memory, with the boundary before it, and its image in
// shared memory. Columns are counted from that boundary.
struct Side {
  const char* boundary;
  char* staged;
  int pad;
  int end;  // pad + columns
  DType dtype;
};

KDFAST_DEVICE Side side_of(const char* row, DType dtype, const Share& share, char* memory) {
  const char* first = row + int64_t(share.begin) * bytes_of(dtype);
  const int pad = share.count > 0 ? pad_before(first, dtype) : 0;
  return {first - pad * bytes_of(dtype), memory + kGuard * bytes_of(dtype), pad, pad + share.count,
          dtype};
}

template <Elements E>
KDFAST_DEVICE void stage_column(const Side& side, int column) {
  const bool exists = column >= side.pad && column < side.end;
  const DType dtype = type_of<E>(side.dtype);
  if (dtype == DType::kFloat32) {
    reinterpret_cast<float*>(side.staged)[column] =
        exists ? reinterpret_cast<const float*>(side.boundary)[column] : -kInfinity;
  } else {
    const uint16_t lowest = dtype == DType::kBFloat16 ? 0xff80u : 0xfc00u;
    reinterpret_cast<uint16_t*>(side.staged)[column] =
        exists ? reinterpret_cast<const uint16_t*>(side.boundary)[column] : lowest;
  }
}

// By ordinary loads, what no bulk copy may touch: the first and the last 16 bytes where the share
// has only a part of them, completed by -inf, and the guards.
template <Elements E>
KDFAST_DEVICE void stage_edges(const Side& side) {
  const int per = per_boundary(type_of<E>(side.dtype));
  const int whole_end = side.end / per * per;
  const int last_end = (side.end + per - 1) / per * per;
  const bool first_is_cut = side.pad > 0;
  const bool last_is_cut = last_end > whole_end && !(first_is_cut && whole_end == 0);
  for (int i = thread_index(); i < 2 * (kGuard + per); i += kThreads) {
    const int place = i % (kGuard + per);
    if (i < kGuard + per) {
      if (place < kGuard || first_is_cut) stage_column<E>(side, place - kGuard);
    } else {
      if (place < kGuard)
        stage_column<E>(side, last_end + place);
      else if (last_is_cut)
        stage_column<E>(side, whole_end + place - kGuard);
    }
  }
}

// The bytes of a chunk, from `begin` on, that bulk copies take: none that the share has not.
struct Piece {
  int begin;
  int bytes;
};

template <Elements E>
KDFAST_DEVICE Piece piece_of(const Side& side, int chunk) {
  const DType dtype = type_of<E>(side.dtype);
  const int per = per_boundary(dtype);
  const int first_whole = side.pad > 0 ? per : 0;
  const int whole_end = side.end / per * per;
  const int begin = max(chunk * kChunkColumns, first_whole);
  const int end = min((chunk + 1) * kChunkColumns, whole_end);
  return {begin * bytes_of(dtype), max(0, end - begin) * bytes_of(dtype)};
}

// A warp's part of the copies: each chunk is asked for by one thread, with a barrier of its own.
template <Elements E>
KDFAST_DEVICE void copy_chunks(const Side& student, const Side& teacher, int chunks,
                               CopyBarrier* arrived) {
  if (thread_index() % kLanes != 0) return;
#pragma unroll 1
  for (int chunk = thread_index() / kLanes; chunk < chunks; chunk += kWarps) {
    const Piece s = piece_of<E>(student, chunk), t = piece_of<E>(teacher, chunk);
    initialise(arrived + chunk);
    publish_barriers();
    expect_bytes(arrived + chunk, s.bytes + t.bytes);
    if (s.bytes > 0)
      copy_to_shared(student.staged + s.begin, student.boundary + s.begin, s.bytes,
                     arrived + chunk);
    if (t.bytes > 0)
      copy_to_shared(teacher.staged + t.begin, teacher.boundary + t.begin, t.bytes,
                     arrived + chunk);
  }
}

template <class T, int N>
struct alignas(N * sizeof(T)) Packed {
  T elements[N];
};

template <class T, int N>
KDFAST_DEVICE void load_elements(const char* staged, int column, bool aligned, float (&out)[N]) {
  const T* first = reinterpret_cast<const T*>(staged) + column;
  if (!aligned) {
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = to_float(first[i]);
  } else if constexpr (sizeof(T) == 4) {
    const auto packed = *reinterpret_cast<const Packed<T, N>*>(first);
#pragma unroll
    for (int i = 0; i < N; ++i) out[i] = packed.elements[i];
  } else if constexpr (N % 2 == 0) {  // A single element is read as if it were not aligned.
    const auto packed = *reinterpret_cast<const Packed<uint32_t, N / 2>*>(first);
#pragma unroll
    for (int i = 0; i < N; i += 2) unpack(packed.elements[i / 2], out[i], out[i + 1], T());
  }
}

template <Elements E, int N>
KDFAST_DEVICE void load_window(const Side& side, int column, bool aligned, float (&out)[N]) {
  switch (type_of<E>(side.dtype)) {
    case DType::kFloat32:
      return load_elements<float>(side.staged, column, aligned, out);
    case DType::kBFloat16:
      return load_elements<bfloat16>(side.staged, column, aligned, out);
    default:
      return load_elements<float16>(side.staged, column, aligned, out);
  }
}

template <class T, int N>
KDFAST_DEVICE void store_elements(char* first, bool whole, int begin, int end,
                                  const float (&values)[N]) {
  Packed<T, N> packed;
#pragma unroll
  for (int i = 0; i < N; ++i) round_to(values[i], packed.elements[i]);
  if (whole) {
    *reinterpret_cast<Packed<T, N>*>(first) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i >= begin && i < end) reinterpret_cast<T*>(first)[i] = packed.elements[i];
  }
}

// The elements [begin, end) of a window of a gradient's row, in one access where they are `whole`.
template <int N>
KDFAST_DEVICE void store_window(char* first, DType dtype, bool whole, int begin, int end,
                                const float (&values)[N]) {
  switch (dtype) {
    case DType::kFloat32:
      return store_elements<float>(first, whole, begin, end, values);
    case DType::kBFloat16:
      return store_elements<bfloat16>(first, whole, begin, end, values);
    default:
      return store_elements<float16>(first, whole, begin, end, values);
  }
}

// Zeros in the columns [begin, end) of a row, by all threads of the cluster.
KDFAST_DEVICE void zero_columns(char* row, DType dtype, int64_t begin, int64_t end, int rank,
                                int blocks) {
  char* first = row + begin * bytes_of(dtype);
  char* last = row + end * bytes_of(dtype);
  char* whole = first + (-reinterpret_cast<uintptr_t>(first) & 15);
  const int64_t wholes = last > whole ? (last - whole) / 16 : 0;
  const int64_t thread = int64_t(rank) * kThreads + thread_index();
  const int64_t threads = int64_t(blocks) * kThreads;
  for (int64_t i = thread; i < wholes; i += threads)
    reinterpret_cast<Packed<uint32_t, 4>*>(whole)[i] = {};
  // The rest are fewer than 16 of 2 bytes.
  char* rest = wholes > 0 ? whole + 16 * wholes : first;
  for (char* at = first + 2 * thread; at < (wholes > 0 ? whole : first); at += 2 * threads)
    *reinterpret_cast<uint16_t*>(at) = 0;
  for (char* at = rest + 2 * thread; at < last; at += 2 * threads)
    *reinterpret_cast<uint16_t*>(at) = 0;
}

template <class T, class Join>
KDFAST_DEVICE T joined_in_warp(T value, Join join) {
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = join(value, shuffle_xor(value, mask));
  return value;
}

// The same bits in every lane: each adds the same pairs.
template <class T>
KDFAST_DEVICE T sum_of_warp(T value) {
  return joined_in_warp(value, [](T a, T b) { return a + b; });
}

KDFAST_DEVICE float max_of_warp(float value) {
  return joined_in_warp(value, [](float a, float b) { return fmaxf(a, b); });
}

// Σ 2^w · (w − o) once w has moved by weight_shift and o by other_shift, both <= 0.
KDFAST_DEVICE float rebased_dot(float dot, float weight_sum, float decay, float weight_shift,
                                float other_shift) {
  // Without a weight that survives, the terms may be infinite, and count for nothing.
  return decay * weight_sum > 0 ? decay * (dot + weight_sum * (weight_shift - other_shift)) : 0.f;
}

// What turns the logits of a row into exponents.
struct Scales {
  float student, teacher;
};

// The maximum goes before the scaling, whose product a low temperature makes large.
KDFAST_DEVICE float exponent_of(float logit, float max, float scale) {
  return (logit - max) * scale;
}

template <int N>
KDFAST_DEVICE float sum_of_exponentials(const float (&logits)[N], float max) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += exp2_flushed(exponent_of(logits[i], max, kLog2E));
  return sum;
}

// The statistics once their maxima are raised to these.
template <Divergence D>
KDFAST_DEVICE Statistics raised(const Statistics& from, float student_max, float teacher_max,
                                Scales scales) {
  const float student_shift = exponent_of(from.student_max, student_max, scales.student);
  const float teacher_shift = exponent_of(from.teacher_max, teacher_max, scales.teacher);
  const float student_decay = exp2_flushed(student_shift);
  const float teacher_decay = exp2_flushed(teacher_shift);
  Statistics to;
  to.student_max = student_max;
  to.teacher_max = teacher_max;
  if (D == Divergence::kForwardKl)
    to.dot =
        rebased_dot(from.dot, float(from.teacher_sum), teacher_decay, teacher_shift, student_shift);
  if (D == Divergence::kReverseKl)
    to.dot =
        rebased_dot(from.dot, float(from.student_sum), student_decay, student_shift, teacher_shift);
  to.student_sum = from.student_sum * student_decay;
  to.teacher_sum = from.teacher_sum * teacher_decay;
  to.hard_sum = from.hard_sum * exp2_flushed(exponent_of(from.student_max, student_max, kLog2E));
  return to;
}

KDFAST_DEVICE void add(Statistics& to, const Statistics& other) {
  to.student_sum += other.student_sum;
  to.teacher_sum += other.teacher_sum;
  to.dot += other.dot;
  to.hard_sum += other.hard_sum;
}

template <Divergence D>
KDFAST_DEVICE Statistics joined_in_warp(const Statistics& mine, Scales scales) {
  Statistics all =
      raised<D>(mine, max_of_warp(mine.student_max), max_of_warp(mine.teacher_max), scales);
  all.student_sum = sum_of_warp(all.student_sum);
  all.teacher_sum = sum_of_warp(all.teacher_sum);
  all.dot = sum_of_warp(all.dot);
  all.hard_sum = sum_of_warp(all.hard_sum);
  return all;
}

// Leaves what a warp knows in every block of the cluster: a lane writes to a block.
template <class T>
KDFAST_DEVICE void publish(T* places, const T& of_warp, int rank, int blocks,
                           CopyBarrier* arrived) {
  const int lane = thread_index() % kLanes;
  if (lane < blocks)
    send_to_block(places + rank * kWarps + thread_index() / kLanes, of_warp, lane, arrived);
}

// The whole row's. Every warp joins what all have left, in one order: the same bits everywhere.
template <Divergence D>
KDFAST_DEVICE Statistics joined_in_cluster(const Statistics* places, int blocks, Scales scales) {
  const int lane = thread_index() % kLanes;
  float student_max = kLowest, teacher_max = kLowest;
  for (int i = lane; i < blocks * kWarps; i += kLanes) {
    student_max = fmaxf(student_max, places[i].student_max);
    teacher_max = fmaxf(teacher_max, places[i].teacher_max);
  }
  Statistics all;
  all.student_max = student_max;
  all.teacher_max = teacher_max;
  // Unrolled it would hold the statistics of several warps in registers.
#pragma unroll 1
  for (int i = lane; i < blocks * kWarps; i += kLanes)
    add(all, raised<D>(places[i], student_max, teacher_max, scales));
  return joined_in_warp<D>(all, scales);
}

KDFAST_DEVICE TermSums joined_in_warp(const TermSums& mine) {
  return {sum_of_warp(mine.f), sum_of_warp(mine.g)};
}

KDFAST_DEVICE TermSums joined_in_cluster(const TermSums* places, int blocks) {
  TermSums all;
  for (int i = thread_index() % kLanes; i < blocks * kWarps; i += kLanes) {
    all.f += places[i].f;
    all.g += places[i].g;
  }
  return joined_in_warp(all);
}

// log2(1 + r) for r in [0, 1], to 2e-7 of its value however small r is.
KDFAST_DEVICE float log2_one_plus(float r) {
  // The minimax polynomial of log2(1 + r) / r.
  float ratio = fmaf(0.007549182119138041f, r, -0.042567061877061725f);
  ratio = fmaf(ratio, r, 0.11285619318382001f);
  ratio = fmaf(ratio, r, -0.19711896978576304f);
  ratio = fmaf(ratio, r, 0.2756414121728344f);
  ratio = fmaf(ratio, r, -0.358408472433635f);
  ratio = fmaf(ratio, r, 0.4806929573141008f);
  ratio = fmaf(ratio, r, -0.7213402080073492f);
  ratio = fmaf(ratio, r, 1.442694997434355f);
  // Not fused with what follows: equal arguments give equal bits wherever this stands.
  return multiply(ratio, r);
}

// log2 of the teacher's sum by the student's. A divergence near 0 is the small difference of large
// logarithms: their ratio is taken from the difference of the sums.
KDFAST_DEVICE float log2_ratio_of(double student_sum, double teacher_sum) {
  const float excess =
      divide(float(fabs(teacher_sum - student_sum)), fminf(float(student_sum), float(teacher_sum)));
  const float log2_ratio = excess < 1 ? log2_one_plus(excess) : log2_of(1 + excess);
  return teacher_sum > student_sum ? log2_ratio : -log2_ratio;
}

struct Log2Parts {
  float one, other;
};

// log2 of 1 / (1 + 2^gap) and of 2^gap / (1 + 2^gap), each to its last digits.
KDFAST_DEVICE Log2Parts log2_parts(float gap) {
  // NaN: both sides are -inf, and neither has weight. fmaxf takes the other argument.
  gap = fminf(fmaxf(gap, -kWidest), kWidest);
  const float log2_whole = log2_one_plus(exp2_flushed(-fabsf(gap)));
  return {-fmaxf(gap, 0.f) - log2_whole, fminf(gap, 0.f) - log2_whole};
}

// How the mixtures weigh their sides.
struct Mixture {
  float teacher_share, student_share;
  float shares_gap;
  Log2Parts log2_shares;
};

struct Terms {
  float f, g;
};

// f and g = q · ∂f/∂q of a column, g up to a multiple of q; gap = log2(q / p).
//
// The divergence is Σ f, and its gradient in the student's scaled logits g − q · Σ g. Of the g that
// serve, these vanish where q is far above p: a student who is sure loses no digits there.
template <Divergence D>
KDFAST_DEVICE Terms terms_of(float p, float q, float gap, const Mixture& mixture) {
  if (D == Divergence::kTvd) return {0.5f * fabsf(p - q), q > p ? 0.f : q < p ? -q : -0.5f * q};
  // Without weight there is no term, however large its logarithm: 0 * inf = 0.
  if (D == Divergence::kForwardKl) return {p * (p > 0 ? -gap : 0.f) * kLn2, -p};
  if (D == Divergence::kReverseKl) {
    const float f = q * (q > 0 ? gap : 0.f) * kLn2;
    return {f, f};
  }
  // By the parts of the mixture m = teacher_share · p + student_share · q: their logarithms come
  // without log m, which would lose the digits that log(p / m) is made of. Those of the shares are
  // taken alike, so that log(p / m) = 0 where p = q.
  const Log2Parts parts = log2_parts(gap + mixture.shares_gap);
  const float log2_p_over_m = parts.one - mixture.log2_shares.one;
  const float log2_q_over_m = parts.other - mixture.log2_shares.other;
  if (D == Divergence::kJsd) {
    const float f_p = p * log2_p_over_m * (mixture.teacher_share * kLn2);
    const float f_q = q * log2_q_over_m * (mixture.student_share * kLn2);
    return {f_p + f_q, q * parts.other * (mixture.student_share * kLn2)};
  }
  if (D == Divergence::kSkewForwardKl)
    return {p * log2_p_over_m * kLn2, -p * exp2_flushed(parts.other)};
  return {q * log2_q_over_m * kLn2, q * (parts.other * kLn2 + exp2_flushed(parts.one))};
}

// total = weight · (alpha · T² · Σ f + (1 − alpha) · hard), and its gradient in the student.
//
// One cluster per row, and a share of the row's columns per block. Bulk copies bring the share of
// both sides into shared memory, where it stays; it is swept
//
//   1. as its chunks arrive, for max and Σ exp of both sides, and for what makes the loss of the
//      plain KLs: Σ exp · (difference of the scaled logits). The blocks send one another theirs;
//   2. for Σ f and Σ g of the other divergences, which the blocks send too;
//   3. for g − q · Σ g, if a gradient is wanted. Σ g is −1 for forward KL and Σ f for reverse KL.
//
// Traffic: one read of both rows and one write of the gradient. The blocks of other clusters on the
// same multiprocessor read and write while this one waits.
template <Divergence D, Elements E>
__global__ void __launch_bounds__(kThreads, kMostBlocksPerMultiprocessor)
    kd_loss_kernel(const __grid_constant__ ClusterKdLoss call, int span) {
  constexpr bool kPlainKl = D == Divergence::kForwardKl || D == Divergence::kReverseKl;
  constexpr int N = kWindow<E>;
  const int rank = cluster_rank(), blocks = cluster_blocks();
  const int64_t row = block_index() / blocks;
  const int64_t outer = row / call.inner_rows, inner = row % call.inner_rows;
  const int vocab = call.vocab_size;
  char* gradient_row = call.gradient.data ? row_of(call.gradient, outer, inner) : nullptr;

  const int64_t label = call.labels ? call.labels[row] : 0;
  if (call.labels && label == call.ignore_index) {
    if (rank == 0 && thread_index() == 0)
      for (int part = 0; part < 3; ++part) call.losses[part * call.rows + row] = 0;
    if (gradient_row) zero_columns(gradient_row, call.gradient.dtype, 0, call.width, rank, blocks);
    return;
  }

  char* student_row = row_of(call.student, outer, inner);
  char* teacher_row = row_of(call.teacher, outer, inner);
  const DType student_type = type_of<E>(call.student.dtype);
  const DType teacher_type = type_of<E>(call.teacher.dtype);
  Exchange& exchange = *reinterpret_cast<Exchange*>(shared_memory());
  char* staged = shared_memory() + sizeof(Exchange);
  const Share share = share_of(vocab, pad_before(student_row, student_type), span, rank);
  const Side student = side_of(student_row, student_type, share, staged);
  const Side teacher =
      side_of(teacher_row, teacher_type, share, staged + side_bytes(span, bytes_of(student_type)));
  const int chunks = (max(student.end, teacher.end) + kChunkColumns - 1) / kChunkColumns;
  copy_chunks<E>(student, teacher, chunks, exchange.arrived);
  if (thread_index() == 0) {
    initialise(&exchange.statistics_arrived);
    initialise(&exchange.terms_arrived);
    publish_barriers();
    expect_bytes(&exchange.statistics_arrived, blocks * kWarps * int(sizeof(Statistics)));
    expect_bytes(&exchange.terms_arrived, kPlainKl ? 0 : blocks * kWarps * int(sizeof(TermSums)));
  }
  arrive_at_cluster();
  stage_edges<E>(student);
  stage_edges<E>(teacher);

  const float temperature = value_at(call.temperature, row);
  const Scales scales = {divide(kLog2E, temperature),
                         divide(kLog2E, value_at(call.teacher_temperature, row))};
  // The hard term has exponentials of its own unless the temperature is 1 for every row.
  const bool hard_exponentials = call.need_hard && !call.hard_is_soft;
  sync_block();

  // Windows are counted from the student's boundary; the teacher's begin `skew` columns further on.
  const int windows = (student.end + N - 1) / N;
  const int skew = teacher.pad - student.pad;
  const bool teacher_aligned = skew % N == 0;
  const auto load_pair = [&](int window, float (&s)[N], float (&t)[N]) {
    load_window<E>(student, window * N, true, s);
    load_window<E>(teacher, window * N + skew, teacher_aligned, t);
  };

  Statistics mine;
  {
    float student_sum = 0, teacher_sum = 0;
    const int reach = N + max(skew, 0), columns = max(student.end, teacher.end);
    CopyBarrier* next = exchange.arrived;
    int arrived = 0;
    for (int window = thread_index(); window < windows; window += kThreads) {
      const int needed = min(window * N + reach, columns);
#pragma unroll 1
      for (; arrived < needed; arrived += kChunkColumns) wait_for_copies(next++);
      float s[N], t[N];
      load_pair(window, s, t);

      float student_max = mine.student_max, teacher_max = mine.teacher_max;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        student_max = fmaxf(student_max, s[i]);
        teacher_max = fmaxf(teacher_max, t[i]);
      }
      const float student_shift = exponent_of(mine.student_max, student_max, scales.student);
      const float teacher_shift = exponent_of(mine.teacher_max, teacher_max, scales.teacher);
      const float student_decay = exp2_flushed(student_shift);
      const float teacher_decay = exp2_flushed(teacher_shift);
      if (D == Divergence::kForwardKl)
        mine.dot = rebased_dot(mine.dot, teacher_sum, teacher_decay, teacher_shift, student_shift);
      if (D == Divergence::kReverseKl)
        mine.dot = rebased_dot(mine.dot, student_sum, student_decay, student_shift, teacher_shift);

      float student_part = 0, teacher_part = 0, dot_part = 0;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float x = exponent_of(s[i], student_max, scales.student);
        const float y = exponent_of(t[i], teacher_max, scales.teacher);
        const float student_exp = exp2_flushed(x);
        const float teacher_exp = exp2_flushed(y);
        student_part += student_exp;
        teacher_part += teacher_exp;
        if (D == Divergence::kForwardKl) dot_part = fmaf(teacher_exp, y - x, dot_part);
        if (D == Divergence::kReverseKl) dot_part = fmaf(student_exp, x - y, dot_part);
      }
      // NaN: there is a logit of -inf, which contributes 0 and not 0 * inf. To begin again is rare;
      // to ask in every column would cost a tenth of the sweep.
      if (kPlainKl && dot_part != dot_part) {
        dot_part = 0;
#pragma unroll
        for (int i = 0; i < N; ++i) {
          const float x = exponent_of(s[i], student_max, scales.student);
          const float y = exponent_of(t[i], teacher_max, scales.teacher);
          const float weight = exp2_flushed(D == Divergence::kForwardKl ? y : x);
          const float gap = D == Divergence::kForwardKl ? y - x : x - y;
          dot_part += weight > 0 ? weight * gap : 0.f;
        }
      }
      mine.dot += dot_part;
      student_sum = fmaf(student_sum, student_decay, student_part);
      teacher_sum = fmaf(teacher_sum, teacher_decay, teacher_part);
      if (hard_exponentials)
        mine.hard_sum =
            fmaf(mine.hard_sum, exp2_flushed(exponent_of(mine.student_max, student_max, kLog2E)),
                 sum_of_exponentials(s, student_max));
      mine.student_max = student_max;
      mine.teacher_max = teacher_max;
    }
    mine.student_sum = student_sum;
    mine.teacher_sum = teacher_sum;
  }
  const Statistics of_warp = joined_in_warp<D>(mine, scales);
  // The others' shared memory is written to once all of them have begun.
  wait_for_cluster();
  publish(exchange.statistics, of_warp, rank, blocks, &exchange.statistics_arrived);
  wait_for_blocks(&exchange.statistics_arrived);
  const Statistics all = joined_in_cluster<D>(exchange.statistics, blocks, scales);

  const float student_sum = float(all.student_sum), teacher_sum = float(all.teacher_sum);
  const float log2_ratio = log2_ratio_of(all.student_sum, all.teacher_sum);
  const float q_weight = divide(1.f, student_sum), p_weight = divide(1.f, teacher_sum);
  const float hard_sum = hard_exponentials ? all.hard_sum : student_sum;
  const Mixture mixture = {call.teacher_share, call.student_share, call.shares_gap,
                           log2_parts(call.shares_gap)};
  // p, q and the terms of a column: after the first exchange, the same in each of the sweeps.
  const auto column_terms = [&](float s, float t, float& q) {
    const float x = exponent_of(s, all.student_max, scales.student);
    const float y = exponent_of(t, all.teacher_max, scales.teacher);
    q = exp2_flushed(x) * q_weight;
    return terms_of<D>(exp2_flushed(y) * p_weight, q, x - y + log2_ratio, mixture);
  };

  float soft, g_sum;
  if (D == Divergence::kForwardKl) {
    soft = (divide(all.dot, teacher_sum) - log2_ratio) * kLn2;
    g_sum = -1;
  } else if (D == Divergence::kReverseKl) {
    soft = (divide(all.dot, student_sum) + log2_ratio) * kLn2;
    g_sum = soft;
  }
  if (!kPlainKl) {
    float f_part = 0, g_part = 0;
    for (int window = thread_index(); window < windows; window += kThreads) {
      float s[N], t[N];
      load_pair(window, s, t);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        float q;
        const Terms terms = column_terms(s[i], t[i], q);
        f_part += terms.f;
        g_part += terms.g;
      }
    }
    publish(exchange.terms, joined_in_warp(TermSums{f_part, g_part}), rank, blocks,
            &exchange.terms_arrived);
    wait_for_blocks(&exchange.terms_arrived);
    const TermSums sums = joined_in_cluster(exchange.terms, blocks);
    // Comparisons swallow a NaN. The sums keep it, and are 0 for a row of -inf.
    const bool valid = student_sum > 0 && teacher_sum > 0;
    soft = valid ? float(sums.f) : NAN;
    g_sum = valid ? float(sums.g) : NAN;
  }

  const float weight = value_at(call.token_weight, row);
  const float t2 = call.scale_t2 ? temperature * temperature : 1.f;
  // The label's place among the block's columns, counted as windows count, and -1 in other blocks.
  const bool label_exists = call.need_hard && label >= 0 && label < vocab;
  const bool label_here = label_exists && label >= share.begin && label < share.begin + share.count;
  const int label_column = label_here ? int(label - share.begin) + student.pad : -1;
  // Who has the label's logit writes the losses: from memory it may be gone, because others write
  // the gradient there.
  if (thread_index() == 0 && (label_exists ? label_here : rank == 0)) {
    // An infinite term without a share contributes 0, not 0 * inf.
    float total = call.soft_share > 0 ? call.soft_share * t2 * soft : 0.f;
    float hard = 0;
    if (call.need_hard) {
      // A label outside the vocabulary makes its row NaN.
      float at_label[1] = {NAN};
      if (label_here) {
        wait_for_copies(exchange.arrived + label_column / kChunkColumns);
        load_window<E>(student, label_column, false, at_label);
      }
      hard = all.student_max - at_label[0] + log2_of(hard_sum) * kLn2;
      total += call.hard_share > 0 ? call.hard_share * hard : 0.f;
    }
    call.losses[row] = total * weight;
    call.losses[call.rows + row] = soft * weight;
    call.losses[2 * call.rows + row] = hard * weight;
  }
  if (!gradient_row) return;

  const float scale = weight * value_at(call.grad_scale, row);
  const float soft_scale = call.soft_share * scale * t2 / temperature;
  const float hard_scale = call.need_hard ? call.hard_share * scale : 0.f;
  // Without a share the terms may be infinite, and count for nothing.
  const bool has_soft = call.soft_share > 0;
  const float g_share = has_soft ? g_sum * soft_scale : 0.f;
  // Of q, of p, and of the hard term's exponentials.
  const float q_factor = (hard_exponentials ? 0.f : hard_scale) - g_share;
  const float student_factor = q_weight * q_factor, teacher_factor = -p_weight * soft_scale;
  const float hard_factor = divide(hard_scale, hard_sum);
  const DType gradient_type = call.gradient.dtype;
  // Where the columns of window 0 would stand, those before the share included.
  char* gradient_window =
      gradient_row + (int64_t(share.begin) - student.pad) * bytes_of(gradient_type);
  const bool gradient_aligned =
      reinterpret_cast<uintptr_t>(gradient_window) % (N * bytes_of(gradient_type)) == 0;
  const bool gradient_like_student = gradient_aligned && gradient_type == student_type;
  // The windows in between have no columns but the share's.
  const int first_whole = (student.pad + N - 1) / N, whole_end = student.end / N;
  const int label_window = label_here ? label_column / N : -1;
  for (int window = thread_index(); window < windows; window += kThreads) {
    float s[N], t[N], gradient[N];
    load_pair(window, s, t);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (D == Divergence::kForwardKl) {
        const float x = exponent_of(s[i], all.student_max, scales.student);
        const float y = exponent_of(t[i], all.teacher_max, scales.teacher);
        gradient[i] = fmaf(exp2_flushed(x), student_factor, exp2_flushed(y) * teacher_factor);
      } else {
        float q;
        const Terms terms = column_terms(s[i], t[i], q);
        gradient[i] = fmaf(q, q_factor, has_soft ? terms.g * soft_scale : 0.f);
      }
    }
    if (hard_exponentials) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        gradient[i] = fmaf(exp2_flushed(exponent_of(s[i], all.student_max, kLog2E)), hard_factor,
                           gradient[i]);
    }
    const int first = window * N;
    if (window == label_window) {
#pragma unroll
      for (int i = 0; i < N; ++i)
        if (label_column == first + i) gradient[i] -= hard_scale;
    }
    const int begin = student.pad - first, end = student.end - first;
    const bool whole = window >= first_whole && window < whole_end;
    if (gradient_like_student && whole)
      store_window(gradient_window + int64_t(first) * bytes_of(student_type), student_type, true,
                   begin, end, gradient);
    else
      store_window(gradient_window + int64_t(first) * bytes_of(gradient_type), gradient_type,
                   gradient_aligned && whole, begin, end, gradient);
  }
  zero_columns(gradient_row, gradient_type, vocab, call.width, rank, blocks);
}

// The kernel of a call, for its host side.
using Kernel = void (*)(ClusterKdLoss, int);

template <Divergence D>
inline Kernel kernel_for(Elements elements) {
  switch (elements) {
    case Elements::kFloat32:
      return kd_loss_kernel<D, Elements::kFloat32>;
    case Elements::kBFloat16:
      return kd_loss_kernel<D, Elements::kBFloat16>;
    case Elements::kFloat16:
      return kd_loss_kernel<D, Elements::kFloat16>;
    default:
      return kd_loss_kernel<D, Elements::kMixed>;
  }
}

inline Elements elements_of(DType student, DType teacher) {
  if (student != teacher) return Elements::kMixed;
  return student == DType::kFloat32    ? Elements::kFloat32
         : student == DType::kBFloat16 ? Elements::kBFloat16
                                       : Elements::kFloat16;
}

inline Kernel kernel_for(Divergence divergence, DType student, DType teacher) {
  const Elements elements = elements_of(student, teacher);
  switch (divergence) {
    case Divergence::kForwardKl:
      return kernel_for<Divergence::kForwardKl>(elements);
    case Divergence::kReverseKl:
      return kernel_for<Divergence::kReverseKl>(elements);
    case Divergence::kJsd:
      return kernel_for<Divergence::kJsd>(elements);
    case Divergence::kSkewForwardKl:
      return kernel_for<Divergence::kSkewForwardKl>(elements);
    case Divergence::kSkewReverseKl:
      return kernel_for<Divergence::kSkewReverseKl>(elements);
    default:
      return kernel_for<Divergence::kTvd>(elements);
  }
}

// The shared memory of a block whose share is `span` columns.
inline int shared_bytes(int span, DType student, DType teacher) {
  return int(sizeof(Exchange)) + side_bytes(span, int(size_of(student))) +
         side_bytes(span, int(size_of(teacher)));
}

}  // namespace kdfast
