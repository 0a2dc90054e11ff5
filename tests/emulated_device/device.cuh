// The functions of csrc/cuda/device.cuh on a CPU, so that its kernels run without a GPU: every
// thread is a fiber, and which of those that can run does so is drawn by chance.
//
// It is a strict device. Shared memory begins as NaN. A bulk copy that is not aligned or leaves its
// tensor is an error. What it copies, and what a block sends to another, arrives when somebody
// waits for it and all of it is on its way, and not before. Waiting for what nobody will do is an
// error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cpu/simd.h"

#define KDFAST_DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define __grid_constant__

namespace kdfast {

using std::max;
using std::min;

// Fewer than on a GPU: the kernel does not depend on it, and every thread costs time here.
constexpr int kThreads = 64;
constexpr int kLanes = 32;

inline float to_float(float x) { return x; }
inline float to_float(bfloat16 x) { return to_real(x); }
inline float to_float(float16 x) { return to_real(x); }

template <class T>
void unpack(uint32_t word, float& first, float& second, T) {
  T both[2];
  std::memcpy(both, &word, sizeof both);
  first = to_float(both[0]);
  second = to_float(both[1]);
}

template <class T>
void round_to(float value, T& out) {
  from_real(value, out);
}

inline float exp2_flushed(float x) {
  const float result = std::exp2(x);
  return result < std::numeric_limits<float>::min() ? 0.f : result;
}

inline float divide(float dividend, float divisor) { return dividend / divisor; }
inline float multiply(float x, float y) { return x * y; }
inline float log2_of(float x) { return std::log2(x); }

namespace emulation {

constexpr int kStackBytes = 128 * 1024;
constexpr int kWarps = kThreads / kLanes;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
  int block, thread;
  bool done;
  std::function<bool()> ready;
  int64_t shuffles, block_syncs, cluster_arrivals, cluster_waits;
};

// A bulk copy from global memory, or what another block sends.
struct Copy {
  char* shared;
  const char* global;
  std::vector<char> sent;
  int bytes;
};

struct BarrierState {
  int arrivals = 0, expected = 0, under_way = 0;
  std::vector<Copy> copies;
  bool complete = false;
};

struct Warp {
  uint64_t values[2][kLanes];
  int64_t arrived = 0;
};

struct Block {
  std::vector<char> memory;
  char* shared;
  int64_t arrived = 0;
  int running = kThreads;
  Warp warps[kWarps];
  std::map<uint64_t*, BarrierState> barriers;
};

struct Cluster {
  int64_t index;
  int shared_bytes;
  std::vector<Block> blocks;
  int64_t arrived = 0;
};

// Where bulk copies may read: the bytes of both tensors.
using Ranges = std::vector<std::pair<const char*, const char*>>;

inline Cluster cluster;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline Fiber* current;
inline ucontext_t scheduler;
inline std::string error;
inline Ranges readable;
inline std::mt19937 chance;
inline std::function<void()> body;

inline Block& here() { return cluster.blocks[current->block]; }

inline void leave() { swapcontext(&current->context, &scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
  if (error.empty())
    error = what + " (block " + std::to_string(current->block) + ", thread " +
            std::to_string(current->thread) + ")";
  for (;;) leave();
}

inline void wait_until(std::function<bool()> ready) {
  current->ready = std::move(ready);
  leave();
}

inline void enter() {
  body();
  current->done = true;
  if (current->cluster_arrivals > current->cluster_waits)
    fail("exits between its arrival at the cluster's barrier and the wait");
  if (--here().running == 0)
    for (const auto& [address, barrier] : here().barriers)
      if (!barrier.complete && barrier.expected > 0) fail("exits before its copies have arrived");
  leave();
}

// Runs `kernel` as one cluster of `blocks` blocks. Returns what went wrong, or "".
inline std::string run(int64_t index, int blocks, int shared_bytes, unsigned seed,
                       std::function<void()> kernel) {
  chance.seed(seed);
  error.clear();
  body = std::move(kernel);
  cluster = Cluster{index, shared_bytes, std::vector<Block>(blocks)};
  for (Block& block : cluster.blocks) {
    block.memory.assign(shared_bytes + 128, char(0xff));
    const uintptr_t address = reinterpret_cast<uintptr_t>(block.memory.data());
    block.shared = block.memory.data() + (128 - address % 128);
  }
  const int threads = blocks * kThreads;
  while (int(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = *fibers[i];
    fiber.block = i / kThreads;
    fiber.thread = i % kThreads;
    fiber.done = false;
    fiber.ready = [] { return true; };
    fiber.shuffles = fiber.block_syncs = fiber.cluster_arrivals = fiber.cluster_waits = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  // Half of the runs draw who goes on each time, the others once: there a thread that can runs as
  // far as it gets.
  const bool drawn_once = seed % 2 == 0;
  int start = chance() % threads;
  for (;;) {
    if (!drawn_once) start = chance() % threads;
    Fiber* next = nullptr;
    bool all_done = true;
    for (int i = 0; i < threads && !next; ++i) {
      Fiber& fiber = *fibers[(start + i) % threads];
      all_done = all_done && fiber.done;
      if (!fiber.done && fiber.ready()) next = &fiber;
    }
    if (!next) return all_done ? "" : "every thread waits for another";
    current = next;
    swapcontext(&scheduler, &next->context);
    if (!error.empty()) return error;
  }
}

}  // namespace emulation

inline int thread_index() { return emulation::current->thread; }
inline int64_t block_index() {
  return emulation::cluster.index * int64_t(emulation::cluster.blocks.size()) +
         emulation::current->block;
}
inline int cluster_rank() { return emulation::current->block; }
inline int cluster_blocks() { return int(emulation::cluster.blocks.size()); }
inline char* shared_memory() { return emulation::here().shared; }

template <class T>
T shuffle_xor(T value, int mask) {
  static_assert(sizeof(T) <= 8, "one or two registers");
  emulation::Fiber& fiber = *emulation::current;
  emulation::Warp& warp = emulation::here().warps[fiber.thread / kLanes];
  const int lane = fiber.thread % kLanes;
  uint64_t* values = warp.values[fiber.shuffles % 2];
  std::memcpy(&values[lane], &value, sizeof value);
  const int64_t all = kLanes * ++fiber.shuffles;
  ++warp.arrived;
  emulation::wait_until([&warp, all] { return warp.arrived >= all; });
  std::memcpy(&value, &values[lane ^ mask], sizeof value);
  return value;
}

inline void sync_block() {
  emulation::Block& block = emulation::here();
  const int64_t all = kThreads * ++emulation::current->block_syncs;
  ++block.arrived;
  emulation::wait_until([&block, all] { return block.arrived >= all; });
}

inline void arrive_at_cluster() {
  emulation::Fiber& fiber = *emulation::current;
  if (fiber.cluster_arrivals++ != fiber.cluster_waits) emulation::fail("arrives twice, waits once");
  ++emulation::cluster.arrived;
}

inline void wait_for_cluster() {
  emulation::Fiber& fiber = *emulation::current;
  if (++fiber.cluster_waits != fiber.cluster_arrivals) emulation::fail("waits without arriving");
  const int64_t all = int64_t(kThreads) * cluster_blocks() * fiber.cluster_waits;
  emulation::wait_until([all] { return emulation::cluster.arrived >= all; });
}

using CopyBarrier = uint64_t;

namespace emulation {

inline BarrierState& barrier_of(Block& block, CopyBarrier* barrier) {
  const auto found = block.barriers.find(barrier);
  if (found == block.barriers.end()) fail("a barrier without a beginning");
  return found->second;
}

inline void add(BarrierState& barrier, Copy copy) {
  if (barrier.complete) fail("a copy for a barrier whose phase has ended");
  barrier.under_way += copy.bytes;
  barrier.copies.push_back(std::move(copy));
}

}  // namespace emulation

inline void initialise(CopyBarrier* barrier) {
  if (!emulation::here().barriers.emplace(barrier, emulation::BarrierState()).second)
    emulation::fail("initialises a barrier twice");
}
inline void publish_barriers() {}

inline void expect_bytes(CopyBarrier* barrier, int bytes) {
  emulation::BarrierState& state = emulation::barrier_of(emulation::here(), barrier);
  if (++state.arrivals > 1) emulation::fail("arrives twice at a barrier of one arrival");
  state.expected = bytes;
}

inline void copy_to_shared(char* shared, const char* global, int bytes, CopyBarrier* barrier) {
  const auto unaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 != 0; };
  if (unaligned(shared) || unaligned(global) || bytes % 16 != 0 || bytes <= 0)
    emulation::fail("a bulk copy that is not of whole, aligned 16 bytes");
  if (shared < shared_memory() ||
      shared + bytes > shared_memory() + emulation::cluster.shared_bytes)
    emulation::fail("a bulk copy outside of shared memory");
  bool inside = false;
  for (const auto& [begin, end] : emulation::readable)
    inside = inside || (global >= begin && global + bytes <= end);
  if (!inside) emulation::fail("a bulk copy outside of its tensor");
  emulation::add(emulation::barrier_of(emulation::here(), barrier), {shared, global, {}, bytes});
}

template <class T>
void send_to_block(T* place, const T& value, int rank, CopyBarrier* barrier) {
  static_assert(sizeof(T) % 16 == 0 && alignof(T) == 16, "whole 16-byte stores");
  // All have begun, and this thread has waited to know it.
  if (emulation::cluster.arrived < int64_t(kThreads) * cluster_blocks() ||
      emulation::current->cluster_waits == 0)
    emulation::fail("writes into a block that may not have begun");
  emulation::Block& other = emulation::cluster.blocks[rank];
  if (other.running < kThreads) emulation::fail("writes into a block that exits");
  const auto in_other = [&other](void* here) {
    return other.shared + (static_cast<char*>(here) - shared_memory());
  };
  char* const shared = in_other(place);
  if (shared < other.shared || shared + sizeof(T) > other.shared + emulation::cluster.shared_bytes)
    emulation::fail("writes outside of shared memory");
  const char* bytes = reinterpret_cast<const char*>(&value);
  emulation::add(emulation::barrier_of(other, reinterpret_cast<CopyBarrier*>(in_other(barrier))),
                 {shared, nullptr, std::vector<char>(bytes, bytes + sizeof(T)), int(sizeof(T))});
}

inline void wait_for_copies(CopyBarrier* barrier) {
  emulation::BarrierState& state = emulation::barrier_of(emulation::here(), barrier);
  emulation::wait_until(
      [&state] { return state.arrivals == 1 && state.under_way >= state.expected; });
  if (state.complete) return;
  if (state.under_way != state.expected) emulation::fail("expects other bytes than are copied");
  for (const emulation::Copy& copy : state.copies)
    std::memcpy(copy.shared, copy.global ? copy.global : copy.sent.data(), copy.bytes);
  state.complete = true;
}

inline void wait_for_blocks(CopyBarrier* barrier) { wait_for_copies(barrier); }

}  // namespace kdfast
