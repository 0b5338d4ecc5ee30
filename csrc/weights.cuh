// A packed weight's codes become bf16: ops/packed_weight.py's canonical form, read as it is stored.
#pragma once

#include "gpu.cuh"

enum Codec : int { kInt4 = 0, kFp4 = 1 };
enum ScaleType : int { kFloat = 0, kHalf = 1, kBfloat16 = 2, kUe8m0 = 3 };

// Every expert's [rows, columns] of one stack, contiguous.
struct Weights {
  const uint8_t* codes;  // [experts, rows, columns / 2], low nibble = even column
  const void* scales;    // [experts, rows, columns / group], of type `scale_type`
  const uint8_t* zeros;  // [experts, rows, columns / group], or null where the zero is 8
  int scale_type, group, rows, columns;
};

// As they are stored, so that nothing waits for them before they are needed.
struct RawScale {
  uint32_t scale, zero;
};

__device__ __forceinline__ RawScale load_scale(const Weights& w, long long at) {
  RawScale raw{0, 8};
  if (w.scale_type == kFloat)
    raw.scale = static_cast<const uint32_t*>(w.scales)[at];
  else if (w.scale_type == kUe8m0)
    raw.scale = static_cast<const uint8_t*>(w.scales)[at];
  else
    raw.scale = static_cast<const uint16_t*>(w.scales)[at];
  if (w.zeros != nullptr) raw.zero = w.zeros[at];
  return raw;
}

__device__ __forceinline__ float decode_scale(uint32_t raw, int scale_type) {
  if (scale_type == kFloat) return gpu::float_of_bits(raw);
  if (scale_type == kHalf) return gpu::float_of_half(static_cast<uint16_t>(raw));
  if (scale_type == kBfloat16) return gpu::float_of_bits(raw << 16);
  // 2^(raw - 127): the lowest is subnormal, and 255 is not a number.
  return gpu::float_of_bits(raw == 0 ? 0x00400000u : raw == 255 ? 0x7FC00000u : raw << 23);
}

// -(128 + zero) twice in bf16; exact, as all integers up to 256 are.
__device__ __forceinline__ uint32_t int4_bias(uint32_t zero) {
  const uint32_t bits = gpu::bits_of_float(-128.0f - static_cast<float>(zero)) >> 16;
  return bits | bits << 16;
}

// Codes kPair and kPair + 4 of the eight in `word`, as two bf16: code - zero, or the e2m1 value. Both exact.
template <int kCodec, int kPair>
__device__ __forceinline__ uint32_t decode(uint32_t word, uint32_t bias) {
  if constexpr (kCodec == kInt4) {
    // With 128's exponent the last four bits of the mantissa count ones.
    return gpu::fma2((word >> (4 * kPair) & 0x000F000Fu) | 0x43004300u, 0x3F803F80u, bias);
  } else {
    // Sign and the three bits below it go to bf16's sign, its last two exponent bits and its first of the mantissa;
    // what the exponents' biases differ by, 2^126, is then multiplied in, subnormals included.
    constexpr int kSign = 12 - 4 * kPair, kValue = 6 - 4 * kPair;
    const uint32_t sign = word << kSign & 0x80008000u;
    const uint32_t value = (kValue >= 0 ? word << (kValue >= 0 ? kValue : 0) : word >> (kValue < 0 ? -kValue : 0));
    return gpu::fma2(sign | (value & 0x01C001C0u), 0x7E807E80u, 0x80008000u);
  }
}
