// What the kernels ask of a GPU beyond plain C++: one function per instruction.
//
// Compiled by anything but nvcc, this is emulator/gpu.h instead, which runs the same sources on a CPU for the tests.
#pragma once

#include <cstdint>

#ifndef __CUDACC__
#include "emulator/gpu.h"
#else
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>

namespace gpu {

// The block's dynamic shared memory.
__device__ __forceinline__ void* shared_memory() {
  extern __shared__ uint4 memory[];
  return memory;
}

// 16 bytes to shared memory, past L1; zeros where `valid` is false. The pointers are multiples of 16.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto at = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(at), "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}

// Closes this thread's group of copies.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kLeft of this thread's groups are under way.
template <int kLeft>
__device__ __forceinline__ void wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// c += a b for a [16, 16] and b [16, 8] in bf16, c [16, 8] in fp32: mma.m16n8k16's fragments (PTX ISA, 9.7.14.5.8).
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// x y + z of two bf16 each, rounded once. The only bf16 arithmetic that sm_80 has.
__device__ __forceinline__ uint32_t fma2(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
}

// (x & mask) | bits in one instruction, which the compiler does not find for two constants.
__device__ __forceinline__ uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(x), "r"(mask), "r"(bits));
  return result;
}

// The bytes of {high, low} that the nibbles of `select` name.
__device__ __forceinline__ uint32_t permute(uint32_t low, uint32_t high, uint32_t select) {
  return __byte_perm(low, high, select);
}

__device__ __forceinline__ float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
__device__ __forceinline__ float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t bits_of_float(float x) { return __float_as_uint(x); }

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Bit i: whether lane i's condition holds.
__device__ __forceinline__ uint32_t ballot(bool condition) { return __ballot_sync(0xFFFFFFFFu, condition); }
// What lane `from` has.
__device__ __forceinline__ int broadcast(int value, int from) { return __shfl_sync(0xFFFFFFFFu, value, from); }
__device__ __forceinline__ int lowest_bit(uint32_t bits) { return __popc((bits & (0u - bits)) - 1); }
__device__ __forceinline__ int count_bits(uint32_t bits) { return __popc(bits); }
// Orders this thread's writes before those that follow, for the whole device.
__device__ __forceinline__ void fence() { __threadfence(); }
__device__ __forceinline__ int add_atomically(int* at, int value) { return atomicAdd(at, value); }
// Reads what other multiprocessors wrote in this launch: past L1.
__device__ __forceinline__ float load_shared_result(const float* at) { return __ldcg(at); }

// How many blocks of a kernel this GPU holds, after asking for their shared memory; a negative cudaError_t where none
// can run. Asked once for each GPU.
template <auto kKernel>
int resident_blocks(int threads, int shared_bytes) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  int device = 0, per_multiprocessor = 0, multiprocessors = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return -static_cast<int>(status);
  if (device < kDevices && known[device] > 0) return known[device];
  status = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status == cudaSuccess)
    status = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kKernel, threads, shared_bytes);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess && per_multiprocessor == 0) status = cudaErrorLaunchOutOfResources;
  if (status != cudaSuccess) return -static_cast<int>(status);
  const int blocks = per_multiprocessor * multiprocessors;
  if (device < kDevices) known[device] = blocks;
  return blocks;
}

// The kernel must have been asked for by `resident_blocks`, unless it takes less than 48 KB of shared memory.
template <typename... Parameters, typename... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, int shared_bytes, void* stream,
           Arguments... arguments) {
  kernel<<<blocks, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace gpu
#endif
