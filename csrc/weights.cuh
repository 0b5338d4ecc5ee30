// A packed weight's codes become bf16: ops/packed_weight.py's canonical form, read as it is stored.
#pragma once

#include "gpu.cuh"

// The kernels are compiled for each. "Narrow": groups of 32 or 64 columns; otherwise they have 128, a multiple of 256,
// or a whole row. FP4's groups always have 32.
enum Format : int { kInt4 = 0, kInt4Zeros = 1, kInt4Narrow = 2, kInt4NarrowZeros = 3, kFp4 = 4 };
enum ScaleType : int { kFloat = 0, kHalf = 1, kBfloat16 = 2, kUe8m0 = 3 };

template <int kFormat>
constexpr bool kHasZeros = kFormat == kInt4Zeros || kFormat == kInt4NarrowZeros;
template <int kFormat>
constexpr bool kIsNarrow = kFormat == kInt4Narrow || kFormat == kInt4NarrowZeros;

// Every expert's [rows, columns] of one stack, contiguous.
struct Weights {
  const uint8_t* codes;  // [experts, rows, columns / 2], low nibble = even column
  const uint8_t* scales;  // [experts, rows, columns / group], of type `scale_type`
  const uint8_t* zeros;  // [experts, rows, columns / group], or null where the zero is 8
  int scale_type, group, rows, columns;
  int segment;  // columns that a warp sums up at a time: 1,024, or all where there are fewer
};

__device__ __forceinline__ int bytes_of(int scale_type) {
  return scale_type == kFloat ? 4 : scale_type == kUe8m0 ? 1 : 2;
}

// `kBytes` bytes from a row's `start`, of which the first `valid` exist; by the widest loads for which all rows of
// `stride` bytes are aligned.
template <int kBytes>
__device__ __forceinline__ void load_bytes(const uint8_t* row, int start, int valid, int stride,
                                           uint32_t (&raw)[kBytes / 4]) {
  const int alignment = start | stride;
  const uint8_t* at = row + start;
#pragma unroll
  for (int i = 0; i < kBytes / 4; ++i) raw[i] = 0;
  if (kBytes >= 16 && alignment % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      if (16 * i >= valid) break;
      const uint4 four = reinterpret_cast<const uint4*>(at)[i];
      raw[4 * i] = four.x, raw[4 * i + 1] = four.y, raw[4 * i + 2] = four.z, raw[4 * i + 3] = four.w;
    }
  } else if (alignment % 8 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 8; ++i) {
      if (8 * i >= valid) break;
      const uint2 two = reinterpret_cast<const uint2*>(at)[i];
      raw[2 * i] = two.x, raw[2 * i + 1] = two.y;
    }
  } else if (alignment % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i)
      if (4 * i < valid) raw[i] = reinterpret_cast<const uint32_t*>(at)[i];
  } else {
#pragma unroll
    for (int i = 0; i < kBytes; ++i)
      if (i < valid) raw[i / 4] |= static_cast<uint32_t>(at[i]) << i % 4 * 8;
  }
}

// A scale of int4 weights as it is stored, in the lowest bits of `raw`.
__device__ __forceinline__ float decode_scale(uint32_t raw, int scale_type) {
  if (scale_type == kFloat) return gpu::float_of_bits(raw);
  return scale_type == kHalf ? gpu::float_of_half(static_cast<uint16_t>(raw)) : gpu::float_of_bits(raw << 16);
}

// -(128 + zero) twice in bf16; exact, as all integers up to 256 are.
__device__ __forceinline__ uint32_t int4_bias(uint32_t zero) {
  return zero * 0x00010001u + 0xC300C300u;  // the last four bits of -128's mantissa count ones
}

// Codes kPair and kPair + 4 of the eight in `word`, as two bf16: code - zero. Exact.
template <int kPair>
__device__ __forceinline__ uint32_t decode_int4(uint32_t word, uint32_t bias) {
  // With 128's exponent the last four bits of the mantissa count ones.
  return gpu::fma2(gpu::and_or(word >> 4 * kPair, 0x000F000Fu, 0x43004300u), 0x3F803F80u, bias);
}

// What `decode_fp4` multiplies by for a scale of 2^(exponent - 127). 2^126, by which the exponents' biases differ, is in
// it, which leaves no room for scales from 2 on: those are 0 here, and divided by `kLargeUnit` where `kLarge` is true.
// From 2^98 on they count as not a number.
constexpr float kLargeUnit = 0x1p96f;
template <bool kLarge>
__device__ __forceinline__ uint32_t fp4_factor(uint32_t exponent) {
  const uint32_t factor = exponent * 0x00800080u + ((126u - (kLarge ? 96u : 0u)) << 7) * 0x00010001u;
  if constexpr (kLarge) return exponent < 128 ? 0 : exponent > 224 ? 0x7FC07FC0u : factor;
  return exponent < 128 ? factor : 0;
}

// Codes kPair and kPair + 4 of the eight in `word`, as two bf16: e2m1 values times the scale in `factor`. Exact.
template <int kPair>
__device__ __forceinline__ uint32_t decode_fp4(uint32_t word, uint32_t factor) {
  // The product has a code twice: its sign goes to bf16's, the three bits below it to bf16's last two exponent bits and
  // first of the mantissa.
  constexpr uint32_t kMask = 0x000F000Fu << 4 * (kPair % 2), kPlaces = 0x1040u >> 4 * (kPair % 2);
  const uint32_t twice = ((kPair < 2 ? word : word >> 8) & kMask) * kPlaces;
  return gpu::fma2(twice & 0x81C081C0u, factor, 0x80008000u);
}

// What two rows' words are decoded with is an int4 bias, or an FP4 factor.
template <int kFormat, int kPair>
__device__ __forceinline__ uint32_t decode(uint32_t word, uint32_t by) {
  if constexpr (kFormat == kFp4) return decode_fp4<kPair>(word, by);
  return decode_int4<kPair>(word, by);
}
