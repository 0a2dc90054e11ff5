// What kernels ask of a device with thread-block clusters (sm_90 and newer), by name: each function
// is an instruction or two. tests/emulated_device has the same functions for a CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define KDFAST_DEVICE __device__ __forceinline__

namespace kdfast {

constexpr int kThreads = 256;
constexpr int kLanes = 32;

// While one block waits for its cluster, the others of its multiprocessor read and write: as many
// as have room at 64 registers a thread, and the shared memory of a block is chosen for so many.
constexpr int kMostBlocksPerMultiprocessor = 4;
constexpr int kBlocksPerMultiprocessor = 3;

using bfloat16 = __nv_bfloat16;
using float16 = __half;

KDFAST_DEVICE float to_float(float x) { return x; }
KDFAST_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
KDFAST_DEVICE float to_float(float16 x) { return __half2float(x); }

// The two elements of a word, the one in its lower half first.
KDFAST_DEVICE void unpack(uint32_t word, float& first, float& second, bfloat16) {
  first = __uint_as_float(word << 16);
  second = __uint_as_float(word & 0xffff0000u);
}
KDFAST_DEVICE void unpack(uint32_t word, float& first, float& second, float16) {
  const float2 both = __half22float2(reinterpret_cast<const __half2&>(word));
  first = both.x;
  second = both.y;
}

// Rounded to nearest even.
KDFAST_DEVICE void round_to(float value, float& out) { out = value; }
KDFAST_DEVICE void round_to(float value, bfloat16& out) { out = __float2bfloat16_rn(value); }
KDFAST_DEVICE void round_to(float value, float16& out) { out = __float2half_rn(value); }

// 2^x to 2 ulp, and an exact 0 where the result would be subnormal.
KDFAST_DEVICE float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

KDFAST_DEVICE float divide(float dividend, float divisor) { return __fdiv_rn(dividend, divisor); }
// A product that the compiler does not fuse with a sum.
KDFAST_DEVICE float multiply(float x, float y) { return __fmul_rn(x, y); }
KDFAST_DEVICE float log2_of(float x) { return log2f(x); }

KDFAST_DEVICE int thread_index() { return threadIdx.x; }
KDFAST_DEVICE int64_t block_index() { return blockIdx.x; }

KDFAST_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

KDFAST_DEVICE int cluster_blocks() {
  int blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

KDFAST_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

KDFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <class T>
KDFAST_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

KDFAST_DEVICE void sync_block() { __syncthreads(); }

// The barrier of a cluster, by which its blocks know that all of them have begun, and that their
// copy barriers are initialised. Not `.aligned`: nothing says that a warp converged.
KDFAST_DEVICE void arrive_at_cluster() {
  // Relaxed: published copy barriers are all that others may see of what a thread wrote before. To
  // release the rest would wait for all that it has written to global memory.
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
KDFAST_DEVICE void wait_for_cluster() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Barriers that count the bytes of copies. Each is used for one phase.
using CopyBarrier = uint64_t;

KDFAST_DEVICE void initialise(CopyBarrier* barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
}

// Barriers are initialised by ordinary writes: the copy engine and the other blocks must see them.
KDFAST_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The one arrival of the barrier's phase, which ends when as many bytes have been copied.
KDFAST_DEVICE void expect_bytes(CopyBarrier* barrier, int bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Both addresses and the number of bytes are multiples of 16.
KDFAST_DEVICE void copy_to_shared(char* shared, const char* global, int bytes,
                                  CopyBarrier* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// *place = value in the block `rank` of the cluster, where `place` and `barrier` are in this
// block's shared memory and stand for the same places there. The write counts as a copy of its
// bytes.
template <class T>
KDFAST_DEVICE void send_to_block(T* place, const T& value, int rank, CopyBarrier* barrier) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) == 16, "whole 16-byte stores");
  uint32_t address, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(shared_address(place)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_barrier)
      : "r"(shared_address(barrier)), "r"(rank));
  const uint4* words = reinterpret_cast<const uint4*>(&value);
#pragma unroll
  for (int i = 0; i < int(sizeof(T) / 16); ++i)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 "
        "[%0], {%1, %2, %3, %4}, [%5];" ::"r"(address + 16 * i),
        "r"(words[i].x), "r"(words[i].y), "r"(words[i].z), "r"(words[i].w), "r"(remote_barrier)
        : "memory");
}

KDFAST_DEVICE void wait_for_copies(CopyBarrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier))
      : "memory");
}

// The same for what other blocks send. It also forgets what L1 holds, which copies do not ask for.
KDFAST_DEVICE void wait_for_blocks(CopyBarrier* barrier) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra again;\n"
      "}\n" ::"r"(shared_address(barrier))
      : "memory");
}

}  // namespace kdfast
