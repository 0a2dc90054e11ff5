// csrc/cuda's kernel of kd_loss on the emulated device, for tests/test_emulated_cuda.py.
#include "../../csrc/cuda/kd_loss_kernel.cuh"

namespace {

// The bytes of what rows of a matrix span, for the check of bulk copies.
std::pair<const char*, const char*> range_of(const kdfast::Matrix& matrix, int64_t rows,
                                             int64_t inner_rows, int64_t width) {
  const int64_t outer = rows / inner_rows;
  const int64_t last =
      (outer - 1) * matrix.outer_stride + (inner_rows - 1) * matrix.inner_stride + width;
  return {matrix.data, matrix.data + last * kdfast::size_of(matrix.dtype)};
}

}  // namespace

// Returns what went wrong, or an empty string.
extern "C" const char* kd_loss_in_clusters(kdfast::ClusterKdLoss* call, double beta, double alpha,
                                           int64_t teacher_width, int blocks, unsigned seed) {
  static std::string error;
  kdfast::set_shares(*call, beta, alpha);
  const kdfast::DType student = call->student.dtype, teacher = call->teacher.dtype;
  const int span = kdfast::span_of(call->vocab_size, blocks);
  const auto kernel = kdfast::kernel_for(call->divergence, student, teacher);
  kdfast::emulation::readable = {
      range_of(call->student, call->rows, call->inner_rows, call->width),
      range_of(call->teacher, call->rows, call->inner_rows, teacher_width)};
  for (int64_t row = 0; row < call->rows; ++row) {
    error = kdfast::emulation::run(row, blocks, kdfast::shared_bytes(span, student, teacher),
                                   seed + unsigned(row), [&] { kernel(*call, span); });
    if (!error.empty()) break;
  }
  return error.c_str();
}

extern "C" kdfast::Share share_of(int vocab, int pad, int span, int rank) {
  return kdfast::share_of(vocab, pad, span, rank);
}

extern "C" int span_of(int vocab, int blocks) { return kdfast::span_of(vocab, blocks); }
