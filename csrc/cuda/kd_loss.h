// kd_loss on devices with thread-block clusters: what its host side and its kernel agree on. No
// CUDA header is needed to read it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "../cpu/kd_loss.h"

#if defined(__CUDACC__)
#define KDFAST_HOST_DEVICE __host__ __device__
#else
#define KDFAST_HOST_DEVICE
#endif

namespace kdfast {

// A value per row, a step of 0 repeating a single one, or without an address a value for all rows.
struct RowValues {
  const float* data;
  int64_t step;
  float otherwise;
};

struct ClusterKdLoss {
  Matrix student;   // (rows / inner_rows, inner_rows, width)
  Matrix teacher;   // (rows / inner_rows, inner_rows, >= vocab_size)
  Matrix gradient;  // (rows / inner_rows, inner_rows, width), or no data; may be a side itself
  int64_t rows;
  int64_t inner_rows;
  int64_t width;
  int vocab_size;
  const int64_t* labels;  // (rows,), or null
  int64_t ignore_index;
  RowValues token_weight;
  RowValues temperature;
  RowValues teacher_temperature;
  RowValues grad_scale;
  float* losses;  // (3, rows): total, soft, hard
  Divergence divergence;
  float teacher_share, student_share;  // of the mixtures
  float shares_gap;                    // log2(student_share / teacher_share)
  float soft_share, hard_share;        // alpha and 1 - alpha
  bool scale_t2;
  bool need_hard;
  bool hard_is_soft;  // temperature 1 for every row
};

inline void set_shares(ClusterKdLoss& call, double beta, double alpha) {
  const double teacher_share = call.divergence == Divergence::kSkewReverseKl ? 1 - beta : beta;
  call.teacher_share = float(teacher_share);
  call.student_share = float(1 - teacher_share);
  call.shares_gap = float(std::log2(1 - teacher_share) - std::log2(teacher_share));
  call.soft_share = float(alpha);
  call.hard_share = float(1 - alpha);
}

// How a row is laid over a cluster and into the shared memory of its blocks.

constexpr int kMostClusterBlocks = 16;

// What arrives at once and is waited for at once: 4 or 8 KiB of each side.
constexpr int kChunkColumns = 2048;
constexpr int kMostChunks = 32;

// Places of -inf around what is staged: a window of the student's may begin as many columns before
// the teacher's first, or end as many behind its last, as the two are misaligned.
constexpr int kGuard = 8;

// Elements of a type in the 16 bytes that a bulk copy is made of.
KDFAST_HOST_DEVICE constexpr int per_boundary(DType dtype) {
  return dtype == DType::kFloat32 ? 4 : 8;
}

// The columns of a row that a block of its cluster takes. `pad` of them would fit between the
// 16-byte boundary at or before the first and the first.
struct Share {
  int begin;
  int count;
  int pad;
};

// A block takes `span` columns counted from the boundary before the row: so every block but the
// first begins on one, wherever the row begins.
KDFAST_HOST_DEVICE constexpr Share share_of(int vocab, int pad, int span, int rank) {
  const int begin = rank == 0 ? 0 : rank * span - pad;
  const int end = (rank + 1) * span - pad < vocab ? (rank + 1) * span - pad : vocab;
  return end > begin ? Share{begin, end - begin, rank == 0 ? pad : 0} : Share{0, 0, 0};
}

// In whole lines of memory, wherever the rows of either element size begin.
constexpr int span_of(int vocab, int blocks) {
  constexpr int kMostPad = 7, kLineColumns = 64;
  const int columns = (vocab + kMostPad + blocks - 1) / blocks;
  return (columns + kLineColumns - 1) / kLineColumns * kLineColumns;
}

// Bytes of shared memory for one side of a share: what is staged, in whole 16 bytes, and guards.
KDFAST_HOST_DEVICE constexpr int side_bytes(int span, int element_size) {
  return (kGuard + span + 8 + kGuard) * element_size;
}

// The number of blocks in a cluster that suits rows of `vocab_size` columns on a device, or 0 and
// the reason why there is none.
struct ClusterPlan {
  int blocks;
  std::string reason;
};

ClusterPlan plan_kd_loss_cluster(int device, int64_t vocab_size, DType student, DType teacher,
                                 Divergence divergence);

// The shared memory of each of the blocks that share a row.
int kd_loss_block_bytes(int vocab_size, int blocks, DType student, DType teacher);

// The losses of every row, and the gradient where there is a buffer for it, on a stream. A row
// pair is read from memory once, and its gradient written once. Returns what went wrong, or "".
std::string kd_loss_in_clusters(const ClusterKdLoss& call, int blocks, int device,
                                uintptr_t stream);

// Why this process cannot use the CUDA kernels that the extension was built with, or "".
std::string cuda_runtime_problem();

}  // namespace kdfast
