// What a warp does: the product of 32 rows of a packed weight with up to eight rows of activations.
//
// A warp keeps its own queue of asynchronous copies, in full cache lines of weights, and shares nothing with others.
// Weights are the left side of the matrix unit's products, because its right side has room for eight tokens, not
// sixteen. Sums have a fixed order, whatever else is computed.
#pragma once

#include "plan.cuh"
#include "weights.cuh"

namespace {

constexpr int kWarps = 4;
// Blocks of a multiprocessor, each with 16 KB of weights on their way: as many as its shared memory holds, but no more
// than leave a thread 168 registers.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 890 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 2;
#else
constexpr int kBlocks = 3;
#endif
constexpr int kStages = 2;  // pieces of a warp's queue, each 128 bytes of every row
constexpr int kRows = 32;   // of a unit: two of the matrix unit's tiles
constexpr int kHalf = 128;  // columns that a warp's lanes read at once: 16 bytes of codes each

// Of one warp. Scales are those of 8 steps of columns: 128 columns each, or 32 where groups are narrow.
struct Queue {
  uint4 codes[kStages][kRows][8];  // 16 bytes of codes at `swizzled`
  union {
    struct {
      float scales[kRows][8];
      uint32_t biases[kRows][8];
    };
    uint8_t exponents[kRows][48];  // FP4's 32 scales, and as much as puts eight rows on different banks
  };
};

struct Shared {
  Queue queues[kWarps];
};
static_assert(sizeof(Shared) == 40960);  // what checks/compile_table.py holds against every GPU's

// Where a row has its `part`-th 16 bytes: so that four lanes of two rows read 16 bytes each, and four lanes of eight
// rows 4 bytes, without bank conflicts.
__device__ __forceinline__ int swizzled(int row, int part) { return part ^ (row % 2 * 4 | row / 2 % 4); }

// A piece of work: columns of segment `segment`, rows of tile `tile`, pairs of chunk `chunk`. Warps take turns.
struct Unit {
  int segment, tile, chunk;
};

struct Work {
  int segments, tiles, chunks;
  Unit step;  // from one unit of a warp to its next

  __device__ Unit split(int number) const {
    const int rest = number / segments;
    return {number % segments, rest % tiles, rest / tiles};
  }
  __device__ Work(const Weights& w, int tiles, int chunks)
      : segments((w.columns + w.segment - 1) / w.segment), tiles(tiles), chunks(chunks) {
    step = split(gridDim.x * kWarps);
  }
  // Neighbouring blocks take neighbouring units: a multiprocessor gets as many as the others, or one less.
  __device__ Unit first() const { return split(threadIdx.x / 32 * gridDim.x + blockIdx.x); }
  __device__ void advance(Unit& unit) const {
    unit.segment += step.segment;
    const int tile = unit.segment >= segments;
    unit.segment -= tile * segments;
    unit.tile += step.tile + tile;
    const int chunk = unit.tile >= tiles;
    unit.tile -= chunk * tiles;
    unit.chunk += step.chunk + chunk;
  }
};

// Rows of a unit: 16 from kUnitRows times its tile, and 16 that are `apart` rows further.
template <int kUnitRows>
struct Stream {
  const Weights& w;
  const Work& work;
  const Chunk* chunks;
  int apart;
  Unit next;            // whose copies are started next
  const uint8_t* codes; // of this lane's first row
  int left;             // columns from there to the end of the segment
  int columns;          // columns from there to the end of the row

  __device__ Stream(const Weights& w, const Work& work, const Chunk* chunks, int apart)
      : w(w), work(work), chunks(chunks), apart(apart), next(work.first()) {
    open();
  }

  __device__ long long first_row(const Unit& unit) const {
    return static_cast<long long>(chunks[unit.chunk].expert) * w.rows + unit.tile * kUnitRows;
  }

  __device__ void open() {
    if (next.chunk >= work.chunks) return;
    const int lane = threadIdx.x % 32, start = next.segment * w.segment;
    codes = w.codes + (first_row(next) + lane / 8) * (w.columns / 2) + start / 2 + lane % 8 * 16;
    columns = w.columns - start;
    left = columns < w.segment ? columns : w.segment;
  }

  // Starts the copies of the next stage, and closes their group.
  __device__ void fetch(Queue& queue, int piece) {
    if (next.chunk < work.chunks) {
      const int lane = threadIdx.x % 32, row_bytes = w.columns / 2;
      const bool valid = lane % 8 * 32 < columns;
      const uint8_t* upper = valid ? codes : codes - lane % 8 * 16;
      const uint8_t* lower = upper + static_cast<long long>(apart) * row_bytes;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = 4 * i + lane / 8, at = swizzled(row, lane % 8);
        gpu::copy_async(&queue.codes[piece][row][at], upper + i * 4 * row_bytes, valid);
        gpu::copy_async(&queue.codes[piece][row + 16][at], lower + i * 4 * row_bytes, valid);
      }
      codes += kStageColumns / 2;
      columns -= kStageColumns;
      left -= kStageColumns;
      if (left <= 0) {
        work.advance(next);
        open();
      }
    }
    gpu::commit();
  }
};

// This lane's scales and zero points, as they are stored: of its row, steps of kStep columns from `start` on.
template <int kFormat>
struct RawScales {
  uint32_t scales[8];
  uint32_t zeros[2];

  __device__ void load(const Weights& w, long long row, int start) {
    const int groups = w.columns / w.group, bytes = bytes_of(w.scale_type), first = start / w.group;
    const uint8_t* at = w.scales + row * groups * bytes;
    if constexpr (kFormat == kFp4) {
      load_bytes<32>(at, first, groups - first, groups, scales);
    } else {
      load_int4(w, at, row, start, groups, first);
    }
  }

  __device__ void load_int4(const Weights& w, const uint8_t* at, long long row, int start, int groups, int first) {
    constexpr int kStep = kIsNarrow<kFormat> ? 32 : kHalf;
    const int bytes = bytes_of(w.scale_type);
    const uint8_t* zeros_at = kHasZeros<kFormat> ? w.zeros + row * groups : nullptr;
    if (w.group == kStep) {
      const int count = groups - first < 8 ? groups - first : 8;
      if (bytes == 4) {
        load_bytes<32>(at, first * 4, count * 4, groups * 4, scales);
      } else {
        uint32_t packed[4];
        load_bytes<16>(at, first * 2, count * 2, groups * 2, packed);
#pragma unroll
        for (int i = 0; i < 8; ++i) scales[i] = packed[i / 2] >> i % 2 * 16 & 0xFFFF;
      }
      if constexpr (kHasZeros<kFormat>) load_bytes<8>(zeros_at, first, count, groups, zeros);
      return;
    }
    // A group has several steps.
    zeros[0] = zeros[1] = 0;
    int group = first, within = start - first * w.group;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      scales[i] = 0;
      if (start + i * kStep < w.columns) {
        scales[i] = bytes == 4 ? reinterpret_cast<const uint32_t*>(at)[group]
                               : static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[group]);
        if constexpr (kHasZeros<kFormat>) zeros[i / 4] |= static_cast<uint32_t>(zeros_at[group]) << i % 4 * 8;
      }
      within += kStep;
      if (within >= w.group) within -= w.group, ++group;
    }
  }

  // For the warp to read. Returns whether FP4 has scales that need `fp4_large_factor`.
  __device__ bool store(Queue& queue, int scale_type) const {
    const int lane = threadIdx.x % 32;
    if constexpr (kFormat == kFp4) {
      uint4* to = reinterpret_cast<uint4*>(queue.exponents[lane]);
      to[0] = {scales[0], scales[1], scales[2], scales[3]};
      to[1] = {scales[4], scales[5], scales[6], scales[7]};
      uint32_t all = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) all |= scales[i];
      return gpu::ballot(all & 0x80808080u) != 0;
    } else {
      decode(queue, scale_type);
      return false;
    }
  }

  __device__ void decode(Queue& queue, int scale_type) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      float4 decoded;
      decoded.x = decode_scale(scales[i], scale_type), decoded.y = decode_scale(scales[i + 1], scale_type);
      decoded.z = decode_scale(scales[i + 2], scale_type), decoded.w = decode_scale(scales[i + 3], scale_type);
      *reinterpret_cast<float4*>(&queue.scales[lane][i]) = decoded;
      if constexpr (kHasZeros<kFormat>) {
        const uint32_t z = zeros[i / 4];
        *reinterpret_cast<uint4*>(&queue.biases[lane][i]) = {int4_bias(z & 0xFF), int4_bias(z >> 8 & 0xFF),
                                                             int4_bias(z >> 16 & 0xFF), int4_bias(z >> 24)};
      }
    }
  }
};

// part += codes[16 rows, 32 columns] @ x[32 columns, 8 pairs], for one word of codes in each of this lane's two rows and
// what they are decoded with.
template <int kFormat>
__device__ __forceinline__ void multiply_words(uint32_t upper, uint32_t lower, uint32_t by0, uint32_t by1,
                                               const uint4& x, float (&part)[4]) {
  const uint32_t a[4] = {decode<kFormat, 0>(upper, by0), decode<kFormat, 0>(lower, by1),
                         decode<kFormat, 1>(upper, by0), decode<kFormat, 1>(lower, by1)};
  const uint32_t c[4] = {decode<kFormat, 2>(upper, by0), decode<kFormat, 2>(lower, by1),
                         decode<kFormat, 3>(upper, by0), decode<kFormat, 3>(lower, by1)};
  gpu::mma(part, a, x.x, x.y);
  gpu::mma(part, c, x.z, x.w);
}

// What a warp has of a stage: its lane reads rows `g`, g + 8, g + 16 and g + 24 of `queue.codes[piece]`.
struct Place {
  Queue& queue;
  int piece, g, t;

  __device__ uint4 part(int row, int number) const { return queue.codes[piece][row][swizzled(row, number)]; }
  __device__ uint32_t word(int row, int number) const {
    return reinterpret_cast<const uint32_t*>(&queue.codes[piece][row][swizzled(row, number)])[t];
  }
};

__device__ __forceinline__ void add_scaled(const float (&part)[4], float upper, float lower, float (&sums)[4]) {
  sums[0] += upper * part[0];
  sums[1] += upper * part[1];
  sums[2] += lower * part[2];
  sums[3] += lower * part[3];
}

// 128 columns, the `half`-th of a segment: lane t of four has 32 columns next to each other.
template <int kFormat>
__device__ __forceinline__ void multiply_half(const Place& at, int half, const uint4 (&x)[4], float (&sums)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int upper = tile * 16 + at.g, lower = upper + 8;
    const uint4 u = at.part(upper, half % 2 * 4 + at.t), l = at.part(lower, half % 2 * 4 + at.t);
    const uint32_t b0 = kHasZeros<kFormat> ? at.queue.biases[upper][half] : int4_bias(8);
    const uint32_t b1 = kHasZeros<kFormat> ? at.queue.biases[lower][half] : int4_bias(8);
    float part[4] = {};
    multiply_words<kFormat>(u.x, l.x, b0, b1, x[0], part);
    multiply_words<kFormat>(u.y, l.y, b0, b1, x[1], part);
    multiply_words<kFormat>(u.z, l.z, b0, b1, x[2], part);
    multiply_words<kFormat>(u.w, l.w, b0, b1, x[3], part);
    add_scaled(part, at.queue.scales[upper][half], at.queue.scales[lower][half], sums[tile]);
  }
}

// The same for FP4: a lane's 32 columns are a group, whose scale the codes are decoded with.
template <bool kLarge>
__device__ __forceinline__ void multiply_half_fp4(const Place& at, int half, const uint4 (&x)[4],
                                                  float (&sums)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int upper = tile * 16 + at.g, lower = upper + 8;
    const uint4 u = at.part(upper, half % 2 * 4 + at.t), l = at.part(lower, half % 2 * 4 + at.t);
    const uint32_t e0 = at.queue.exponents[upper][half * 4 + at.t], e1 = at.queue.exponents[lower][half * 4 + at.t];
    const uint32_t f0 = fp4_factor<kLarge>(e0), f1 = fp4_factor<kLarge>(e1);
    multiply_words<kFp4>(u.x, l.x, f0, f1, x[0], sums[tile]);
    multiply_words<kFp4>(u.y, l.y, f0, f1, x[1], sums[tile]);
    multiply_words<kFp4>(u.z, l.z, f0, f1, x[2], sums[tile]);
    multiply_words<kFp4>(u.w, l.w, f0, f1, x[3], sums[tile]);
  }
}

// The same for narrow groups: 32 columns at a time, of which a lane has 8. `half` is that of the stage.
template <int kFormat>
__device__ __forceinline__ void multiply_half_narrow(const Place& at, int half, const uint4 (&x)[4],
                                                     float (&sums)[2][4]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const int upper = tile * 16 + at.g, lower = upper + 8;
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const int step = half * 4 + b;
      const uint32_t b0 = kHasZeros<kFormat> ? at.queue.biases[upper][step] : int4_bias(8);
      const uint32_t b1 = kHasZeros<kFormat> ? at.queue.biases[lower][step] : int4_bias(8);
      float part[4] = {};
      multiply_words<kFormat>(at.word(upper, step), at.word(lower, step), b0, b1, x[b], part);
      add_scaled(part, at.queue.scales[upper][step], at.queue.scales[lower][step], sums[tile]);
    }
  }
}

// sums += a unit's product; sums[tile] is the matrix unit's accumulator of 16 rows. `x`: this lane's pair's activations
// at the unit's first column. `piece`: where the stream's next stage is.
template <int kFormat, int kUnitRows>
__device__ void multiply(const Unit& unit, Stream<kUnitRows>& stream, const uint16_t* x, Queue& queue, int& piece,
                         float (&sums)[2][4]) {
  const Weights& w = stream.w;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, start = unit.segment * w.segment;
  const int end = start + w.segment < w.columns ? start + w.segment : w.columns;
  const long long scale_row = stream.first_row(unit) + (lane < 16 ? lane : stream.apart + lane - 16);
  const uint4* from = reinterpret_cast<const uint4*>(x) + t;
  float large[2][4] = {};
  bool has_large = false;
  for (int column = start, stage = 0; column < end; column += kStageColumns, ++stage, from += 32) {
    RawScales<kFormat> raw;
    const bool fresh = kIsNarrow<kFormat> || stage == 0;
    if (fresh) raw.load(w, scale_row, column);
    uint4 x0[4], x1[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x0[i] = from[i * 4], x1[i] = from[16 + i * 4];
    gpu::wait<kStages - 2>();
    gpu::sync_warp();  // all copies of this piece have landed, and no lane reads the piece before it any more
    stream.fetch(queue, (piece + kStages - 1) % kStages);
    if (fresh) {
      has_large = raw.store(queue, w.scale_type);
      gpu::sync_warp();
    }
    const Place at{queue, piece, g, t};
    piece = (piece + 1) % kStages;
    if constexpr (kFormat == kFp4) {
      multiply_half_fp4<false>(at, 2 * stage, x0, sums);
      multiply_half_fp4<false>(at, 2 * stage + 1, x1, sums);
      if (has_large) {
        gpu::sync_warp();  // so that the compiler reads codes again rather than keep them in registers
        multiply_half_fp4<true>(at, 2 * stage, x0, large);
        multiply_half_fp4<true>(at, 2 * stage + 1, x1, large);
      }
    } else if constexpr (kIsNarrow<kFormat>) {
      multiply_half_narrow<kFormat>(at, 0, x0, sums);
      multiply_half_narrow<kFormat>(at, 1, x1, sums);
    } else {
      multiply_half<kFormat>(at, 2 * stage, x0, sums);
      multiply_half<kFormat>(at, 2 * stage + 1, x1, sums);
    }
  }
  if (kFormat == kFp4 && has_large)
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] += large[i / 4][i % 4] * kLargeUnit;
}

}  // namespace
