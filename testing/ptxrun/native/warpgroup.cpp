// wgmma, the matrix product of four warps: each computes its own 16 of 64 rows when it reaches the instruction.
// A descriptor of 64 bits says where an operand is in shared memory; see "matrix descriptor" in the PTX ISA, and the
// canonical layouts in CUTLASS's mma_sm90_desc.hpp. The product is complete at once: a missing wait is not found.
#include "machine.h"
#include "memory.h"
#include "numbers.h"

namespace {

// A matrix in shared memory: its rows are the result's rows or columns (m or n), its columns are summed over (k).
struct Descriptor {
  uint32_t start, leading, stride, span;  // span: bytes of a swizzled row, 16 without swizzling
  bool transposed;

  Descriptor(uint64_t bits, bool transposed_) : transposed(transposed_) {
    start = uint32_t(bits & 0x3FFF) << 4;
    leading = uint32_t(bits >> 16 & 0x3FFF) << 4;
    stride = uint32_t(bits >> 32 & 0x3FFF) << 4;
    constexpr uint32_t spans[] = {16, 128, 64, 32};
    span = spans[bits >> 62];
  }

  // The address of element (row, k), `size` bytes each.
  uint32_t at(uint32_t row, uint32_t k, uint32_t size) const {
    uint32_t offset;
    if (!transposed) {  // k runs through a span of bytes; eight rows make a core matrix
      const uint32_t byte = k * size;
      offset = row / 8 * stride + row % 8 * span;
      offset += span == 16 ? byte / 16 * leading + byte % 16 : byte;
    } else {  // rows run through the span
      const uint32_t byte = row * size;
      if (span == 16) offset = byte / 16 * stride + byte % 16 + k % 8 * 16 + k / 8 * leading;
      else offset = byte / span * leading + byte % span + k % 8 * span + k / 8 * stride;
    }
    uint32_t address = start + offset;
    // 16-byte units are permuted within a span by the row that they are in.
    if (span == 128) address ^= (address >> 7 & 7) << 4;
    else if (span == 64) address ^= (address >> 7 & 3) << 4;
    else if (span == 32) address ^= (address >> 7 & 1) << 4;
    return address;
  }
};

template <class Format>
float element(Warp& w, const Instruction& in, const Descriptor& d, uint32_t row, uint32_t k) {
  uint16_t bits = 0;
  if (const uint8_t* from = locate(w, in, 0, d.at(row, k, 2), 2, false)) std::memcpy(&bits, from, 2);
  return Format::unpack(bits);
}

template <class Format>
void multiply(Warp& w, const Instruction& in, Mask active) {
  if (active != kAllLanes) report(w, in, kDivergentWarpOperation, 0, active);
  constexpr int kDepth = 16;
  const int columns = 8 * in.vector, results = 4 * in.vector;
  const bool described = in.modifier & 1;
  static thread_local float a[16][kDepth], b[kDepth][256], c[16][256];
  int next = results;
  if (described) {
    const Descriptor d(operand<uint64_t>(w, in, next++)[0], in.modifier & 2);
    const int first = w.number % 4 * 16;
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < kDepth; ++k) a[m][k] = element<Format>(w, in, d, first + m, k);
  } else {
    for (int r = 0; r < 4; ++r, ++next) {
      const uint32_t* from = operand<uint32_t>(w, in, next);
      for (int i = 0; i < kLanes; ++i)
        for (int e = 0; e < 2; ++e)
          a[i / 4 + r % 2 * 8][r / 2 * 8 + i % 4 * 2 + e] = Format::unpack(uint16_t(from[i] >> (16 * e)));
    }
  }
  const Descriptor d(operand<uint64_t>(w, in, next++)[0], in.modifier & 4);
  for (int n = 0; n < columns; ++n)
    for (int k = 0; k < kDepth; ++k) b[k][n] = element<Format>(w, in, d, n, k);
  const bool adds = predicate(w, in.operand[next]) & 1;
  for (int r = 0; r < results; ++r) {
    const float* from = operand<float>(w, in, r);
    for (int i = 0; i < kLanes; ++i)
      c[i / 4 + r / 2 % 2 * 8][r / 4 * 8 + i % 4 * 2 + r % 2] = adds ? from[i] : 0.0f;
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < kDepth; ++k)
      for (int n = 0; n < columns; ++n) c[m][n] = __builtin_fmaf(a[m][k], b[k][n], c[m][n]);
  for (int r = 0; r < results; ++r) {
    float* to = operand<float>(w, in, r);
    for (int i = 0; i < kLanes; ++i) to[i] = c[i / 4 + r / 2 % 2 * 8][r / 4 * 8 + i % 4 * 2 + r % 2];
  }
}

const Entry kEntries[] = {{"wgmma.f32.bf16.bf16", multiply<Bf16>}, {"wgmma.f32.f16.f16", multiply<Fp16>}};

}  // namespace

Handler find_warpgroup(const std::string& name) { return find_in(kEntries, name); }
