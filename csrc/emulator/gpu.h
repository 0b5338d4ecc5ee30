// gpu.cuh on a CPU, for tests: every CUDA thread is a fiber, and they meet where a GPU's threads meet.
//
// It is strict where a GPU only may be: shared memory starts as NaN, an asynchronous copy lands when its thread waits
// for it and not before, a block whose threads wait for different things stops with a message. Blocks run one after
// another, so it shows no race between blocks.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (gpu::emulator::current->thread)
#define blockIdx (gpu::emulator::current->block)
#define gridDim (gpu::emulator::grid)

struct alignas(8) uint2 {
  uint32_t x, y;
};

struct alignas(8) float2 {
  float x, y;
};

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace gpu::emulator {

constexpr size_t kStackBytes = 1 << 16;

struct Copy {
  void* to;
  const void* from;
  bool valid;
};

// Threads that wait for one another.
struct Group {
  int alive = 0, arrived = 0, generation = 0;
};

// What the lanes of a warp show each other, alternately in two places, so that no lane overwrites what is still read.
struct Shown {
  bool condition[32];
  int value[32];
  uint32_t a[32][4], b[32][2];
};

struct Warp : Group {
  Shown shown[2];
};

struct Thread {
  dim3 thread{0}, block{0};
  Warp* warp = nullptr;
  int turn = 0;
  std::deque<std::vector<Copy>> closed;
  std::vector<Copy> open;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  bool done = false;

  void start(unsigned index, dim3 at, Warp& mine);
};

inline Thread* current = nullptr;
inline ucontext_t scheduler;
inline Group whole_block;
inline dim3 grid{0};
inline std::vector<uint64_t> shared;
inline const std::function<void()>* body = nullptr;
inline long progress = 0;  // how often a group has met, or a thread has ended

inline void arrive(Group& group) {
  if (++group.arrived == group.alive) {
    group.arrived = 0;
    ++group.generation;
    ++progress;
  }
}

inline void meet(Group& group) {
  const int generation = group.generation;
  arrive(group);
  while (group.generation == generation) swapcontext(&current->context, &scheduler);
}

inline void leave(Group& group) {
  --group.alive;
  ++progress;
  if (group.alive > 0 && group.arrived == group.alive) {
    group.arrived = 0;
    ++group.generation;
  }
}

inline void run_thread() {
  (*body)();
  current->done = true;
  leave(whole_block);
  leave(*current->warp);
  swapcontext(&current->context, &scheduler);
}

inline void Thread::start(unsigned index, dim3 at, Warp& mine) {
  thread.x = index;
  block = at;
  warp = &mine;
  ++mine.alive;
  closed.clear();
  open.clear();
  done = false;
  turn = 0;
  getcontext(&context);
  context.uc_stack = {stack.get(), 0, kStackBytes};
  makecontext(&context, run_thread, 0);
}

inline void run_block(dim3 block, int threads, int shared_bytes) {
  shared.assign(shared_bytes / 8 + 2, ~uint64_t{0});
  whole_block = {threads};
  std::vector<Warp> warps((threads + 31) / 32);
  static std::vector<std::unique_ptr<Thread>> fibers;
  while (fibers.size() < static_cast<size_t>(threads)) fibers.push_back(std::make_unique<Thread>());
  for (int i = 0; i < threads; ++i) fibers[i]->start(i, block, warps[i / 32]);
  for (int done = 0; done < threads;) {
    const long before = progress;
    for (int i = 0; i < threads; ++i) {
      current = fibers[i].get();
      if (current->done) continue;
      swapcontext(&scheduler, &current->context);
      done += current->done;
    }
    if (progress == before) {
      std::fprintf(stderr, "emulator: the threads of block (%u, %u) wait for different things\n", block.x, block.y);
      std::abort();
    }
  }
}

inline float float_of_bf16(uint32_t bits) {
  const uint32_t wide = bits << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

}  // namespace gpu::emulator

namespace gpu {

inline void* shared_memory() {
  const auto start = reinterpret_cast<uintptr_t>(emulator::shared.data());
  return reinterpret_cast<void*>((start + 15) & ~uintptr_t{15});
}

inline void copy_async(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16) {
    std::fprintf(stderr, "emulator: a copy of 16 bytes is not aligned\n");
    std::abort();
  }
  emulator::current->open.push_back({shared, global, valid});
}

inline void commit() {
  emulator::current->closed.push_back(std::move(emulator::current->open));
  emulator::current->open.clear();
}

template <int kLeft>
void wait() {
  auto& closed = emulator::current->closed;
  for (; closed.size() > kLeft; closed.pop_front())
    for (const auto& copy : closed.front())
      copy.valid ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

inline void sync_block() { emulator::meet(emulator::whole_block); }
inline void sync_warp() { emulator::meet(*emulator::current->warp); }

inline uint32_t ballot(bool condition) {
  auto& thread = *emulator::current;
  auto& shown = thread.warp->shown[thread.turn++ % 2];
  shown.condition[thread.thread.x % 32] = condition;
  emulator::meet(*thread.warp);
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<uint32_t>(shown.condition[lane]) << lane;
  return bits;
}

inline int broadcast(int value, int from) {
  auto& thread = *emulator::current;
  auto& shown = thread.warp->shown[thread.turn++ % 2];
  shown.value[thread.thread.x % 32] = value;
  emulator::meet(*thread.warp);
  return shown.value[from];
}

inline void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  auto& thread = *emulator::current;
  auto& shown = thread.warp->shown[thread.turn++ % 2];
  const int lane = thread.thread.x % 32, g = lane / 4, t = lane % 4;
  std::memcpy(shown.a[lane], a, sizeof(a));
  shown.b[lane][0] = b0;
  shown.b[lane][1] = b1;
  emulator::meet(*thread.warp);
  for (int i = 0; i < 4; ++i) {
    const int row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (int k = 0; k < 16; ++k) {
      const uint32_t left = shown.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2] >> k % 2 * 16 & 0xFFFF;
      const uint32_t right = shown.b[column * 4 + k % 8 / 2][k / 8] >> k % 2 * 16 & 0xFFFF;
      c[i] += emulator::float_of_bf16(left) * emulator::float_of_bf16(right);
    }
  }
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline uint32_t bits_of_float(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

inline uint32_t fma2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result = 0;
  for (int shift = 0; shift < 32; shift += 16) {
    // In double the product and the sum of these kernels' operands are exact.
    const double exact = static_cast<double>(emulator::float_of_bf16(x >> shift & 0xFFFF)) *
                             emulator::float_of_bf16(y >> shift & 0xFFFF) +
                         emulator::float_of_bf16(z >> shift & 0xFFFF);
    const uint32_t bits = bits_of_float(static_cast<float>(exact));
    result |= (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << shift;
  }
  return result;
}

inline uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }

inline uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(bytes >> (select >> 4 * i & 7) * 8 & 0xFF) << 8 * i;
  return result;
}

inline int lowest_bit(uint32_t bits) { return __builtin_ffs(static_cast<int>(bits)) - 1; }
inline int count_bits(uint32_t bits) { return __builtin_popcount(bits); }
inline void fence() {}
inline int add_atomically(int* at, int value) {
  const int before = *at;
  *at += value;
  return before;
}
inline float load_shared_result(const float* at) { return *at; }

// Few, so that blocks have more than one piece of work.
template <auto kKernel>
int resident_blocks(int, int) {
  return 3;
}

template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, void*, Arguments... arguments) {
  const std::function<void()> body = [&] { kernel(arguments...); };
  emulator::body = &body;
  emulator::grid = dim3(blocks);
  for (int i = 0; i < blocks; ++i) emulator::run_block(dim3(i, 0), threads, shared_bytes);
  emulator::body = nullptr;
  return 0;
}

}  // namespace gpu
