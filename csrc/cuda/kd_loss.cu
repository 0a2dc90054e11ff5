#include <cuda_runtime.h>

#include <limits>
#include <mutex>
#include <set>
#include <utility>

#include "kd_loss_kernel.cuh"

namespace kdfast {
namespace {

// What a launch needs beside the kernel's arguments.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute cluster;

  Launch(int64_t rows, int blocks, int bytes, cudaStream_t stream) {
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(blocks), 1, 1};
    config.gridDim = dim3(unsigned(rows * blocks));
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
  }
  Launch(const Launch&) = delete;
};

std::string text_of(cudaError_t error) {
  // The error must not be found by whoever asks next.
  cudaGetLastError();
  return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

// Lets a kernel have all of a device's shared memory, once per device.
cudaError_t lift_limits(Kernel kernel, int device) {
  static std::mutex mutex;
  static std::set<std::pair<int, Kernel>> lifted;
  const std::lock_guard<std::mutex> lock(mutex);
  if (lifted.count({device, kernel})) return cudaSuccess;
  int bytes = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  for (const auto& [attribute, value] :
       {std::pair(cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
        std::pair(cudaFuncAttributePreferredSharedMemoryCarveout,
                  int(cudaSharedmemCarveoutMaxShared)),
        // More than 8 blocks are not portable: a device may have no room for them.
        std::pair(cudaFuncAttributeNonPortableClusterSizeAllowed, 1)})
    if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, attribute, value);
  if (error == cudaSuccess) lifted.insert({device, kernel});
  return error;
}

// The device of a scope, for this copy of the CUDA runtime. Where it is the current one nothing is
// set: to set a device makes a context on it.
class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device) {
    error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device_) error = cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (error == cudaSuccess && before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  cudaError_t error;

 private:
  int device_;
  int before_ = 0;
};

}  // namespace

ClusterPlan plan_kd_loss_cluster(int device, int64_t vocab_size, DType student, DType teacher,
                                 Divergence divergence) {
  const OnDevice on_device(device);
  if (on_device.error != cudaSuccess) return {0, text_of(on_device.error)};
  int most_bytes = 0, all_bytes = 0, reserved_bytes = 0;
  for (const auto& [attribute, value] :
       {std::pair(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most_bytes),
        std::pair(cudaDevAttrMaxSharedMemoryPerMultiprocessor, &all_bytes),
        std::pair(cudaDevAttrReservedSharedMemoryPerBlock, &reserved_bytes)})
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device))
      return {0, text_of(error)};

  // The smallest cluster whose blocks fit kBlocksPerMultiprocessor times into a multiprocessor, or
  // else the largest cluster that the device can schedule.
  const int comfortable = all_bytes / kBlocksPerMultiprocessor - reserved_bytes;
  const Kernel kernel = kernel_for(divergence, student, teacher);
  if (const cudaError_t error = lift_limits(kernel, device)) return {0, text_of(error)};
  ClusterPlan plan = {0, ""};
  for (int blocks = 1; blocks <= kMostClusterBlocks; blocks *= 2) {
    if (vocab_size > int64_t(blocks) * (kMostChunks - 1) * kChunkColumns) continue;
    const int bytes = kd_loss_block_bytes(int(vocab_size), blocks, student, teacher);
    if (bytes > most_bytes) continue;
    Launch launch(1, blocks, bytes, nullptr);
    int clusters = 0;
    // A cluster size that the device does not know is an error, one that does not fit a zero.
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &launch.config) != cudaSuccess) {
      cudaGetLastError();
      continue;
    }
    if (clusters == 0) continue;
    plan.blocks = blocks;
    if (bytes <= comfortable) break;
  }
  if (plan.blocks == 0)
    plan.reason = "no cluster of this device holds a pair of rows of " +
                  std::to_string(vocab_size) + " columns in its shared memory";
  return plan;
}

int kd_loss_block_bytes(int vocab_size, int blocks, DType student, DType teacher) {
  return shared_bytes(span_of(vocab_size, blocks), student, teacher);
}

std::string kd_loss_in_clusters(const ClusterKdLoss& call, int blocks, int device,
                                uintptr_t stream) {
  if (call.rows == 0) return "";
  if (call.rows > std::numeric_limits<int32_t>::max() / blocks)
    return std::to_string(call.rows) + " rows are more than a grid has clusters";
  const OnDevice on_device(device);
  if (on_device.error != cudaSuccess) return text_of(on_device.error);
  const DType student = call.student.dtype, teacher = call.teacher.dtype;
  const Kernel kernel = kernel_for(call.divergence, student, teacher);
  const int span = span_of(call.vocab_size, blocks);
  const int bytes = shared_bytes(span, student, teacher);
  cudaError_t error = lift_limits(kernel, device);
  if (error != cudaSuccess) return text_of(error);
  Launch launch(call.rows, blocks, bytes, reinterpret_cast<cudaStream_t>(stream));
  error = cudaLaunchKernelEx(&launch.config, kernel, call, span);
  return error == cudaSuccess ? "" : text_of(error);
}

std::string cuda_runtime_problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  return error == cudaSuccess ? "" : text_of(error);
}

}  // namespace kdfast
