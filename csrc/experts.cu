// The routed experts for a few tokens: W2 (silu(W1 x) * W3 x), summed over each token's experts, in two launches.
//
// Decoding reads six experts per token and little else, so both kernels are built around reading weights once, in full
// rows of cache lines, with enough of them on the way: every warp keeps its own queue of asynchronous copies. Weights
// are the left side of the matrix unit's products, because its right side has room for eight tokens, not sixteen.
// A block takes 32 rows of one expert for up to eight (token, expert) pairs; its warps share the columns.
//
// Sums have a fixed order: columns within a warp, then warps, then a token's experts as the router listed them.

#include "weights.cuh"

// `tokens` x `topk` pairs; experts outside [first, first + experts) are other ranks'.
struct Routing {
  const long long* ids;  // [tokens, topk]
  const float* weights;  // [tokens, topk]
  int tokens, topk, first, experts;
};

namespace {

constexpr int kWarps = 4;
constexpr int kStages = 3;       // pieces of a warp's queue
constexpr int kStageBlocks = 8;  // of 32 columns; so a piece has 128 bytes, a cache line, of every row
constexpr int kRows = 32;        // of a block: two of the matrix unit's tiles
constexpr int kPairs = 8;        // of a block, at most
constexpr int kLineWords = 36;   // 32 and as many more as put the eight rows that are read at once on different banks

struct Queue {
  uint32_t codes[kStages][kRows][kLineWords];
  float scales[kRows][kStageBlocks + 1];
  uint32_t biases[kRows][kStageBlocks + 1];
};

struct Shared {
  union {
    Queue queues[kWarps];
    float sums[kWarps][kRows][kPairs + 1];
  };
  int members[kPairs];  // pairs of this block, in order
  int count, held;
  bool last;
};
static_assert(sizeof(Shared) == 64556);  // what checks/compile_table.py holds against every GPU's

// Finds the pairs of this block: those numbered 8n to 8n + 7 among the pairs of its expert, where pair `slot` is
// number 8n; none where it has another number, or its expert is not held. Returns the expert, counted from the first.
__device__ int gather_pairs(const Routing& routing, int slot, Shared& shared) {
  const int pairs = routing.tokens * routing.topk, lane = threadIdx.x % 32;
  const long long expert = routing.ids[slot];
  if (threadIdx.x < 32) {
    int before = 0, rank = 0, held = 0;
    const bool here = expert >= routing.first && expert < routing.first + routing.experts;
    for (int base = 0; base < pairs; base += 32) {
      const int pair = base + lane;
      const long long id = pair < pairs ? routing.ids[pair] : -1;
      held += gpu::count_bits(gpu::ballot(pair < pairs && id >= routing.first && id < routing.first + routing.experts));
      const uint32_t same = gpu::ballot(pair < pairs && id == expert);
      if (slot >= base && slot < base + 32) rank = before + gpu::count_bits(same & ((1u << (slot - base)) - 1));
      // Those before `slot` are counted by now, because its own stretch comes first or is this one.
      const int number = before + gpu::count_bits(same & ((1u << lane) - 1)) - rank;
      if (here && rank % kPairs == 0 && (same >> lane & 1) && pair >= slot && number < kPairs)
        shared.members[number] = pair;
      before += gpu::count_bits(same);
    }
    if (lane == 0) {
      const int left = before - rank;
      shared.count = !here || rank % kPairs != 0 ? 0 : left < kPairs ? left : kPairs;
      shared.held = held;
    }
  }
  gpu::sync_block();
  return static_cast<int>(expert - routing.first);
}

// The rows of a block: 16 from `first` and 16 from `second`, each below its end.
struct Rows {
  int first, first_end, second, second_end;

  __device__ int at(int i) const { return i < 16 ? first + i : second + i - 16; }
  __device__ bool valid(int i) const { return i < 16 ? first + i < first_end : second + i - 16 < second_end; }
};

// part += codes[16 rows, 32 columns] @ x[32 columns, 8 pairs]: block `b` of a piece, rows `upper` and `upper` + 8 of this
// thread, whose zero points are those of group `i`.
template <int kCodec>
__device__ void multiply_block(const Queue& queue, int piece, int upper, int b, int i, uint32_t x0, uint32_t x1,
                               uint32_t x2, uint32_t x3, float (&part)[4]) {
  const int t = threadIdx.x % 4, lower = upper + 8;
  const uint32_t w0 = queue.codes[piece][upper][b * 4 + t], w1 = queue.codes[piece][lower][b * 4 + t];
  const uint32_t b0 = kCodec == kInt4 ? queue.biases[upper][i] : 0;
  const uint32_t b1 = kCodec == kInt4 ? queue.biases[lower][i] : 0;
  const uint32_t a[4] = {decode<kCodec, 0>(w0, b0), decode<kCodec, 0>(w1, b1), decode<kCodec, 1>(w0, b0),
                         decode<kCodec, 1>(w1, b1)};
  const uint32_t c[4] = {decode<kCodec, 2>(w0, b0), decode<kCodec, 2>(w1, b1), decode<kCodec, 3>(w0, b0),
                         decode<kCodec, 3>(w1, b1)};
  gpu::mma(part, a, x0, x1);
  gpu::mma(part, c, x2, x3);
}

// One warp's share of [32 rows] x [8 pairs]: sums[tile] is the matrix unit's accumulator of a tile of 16 rows.
// `column` is the activation row of pair lane / 4, or null: its dot products are zero then.
template <int kCodec>
__device__ void multiply(const Weights& w, int expert, const Rows& rows, const uint16_t* column, Queue& queue,
                         float (&sums)[2][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int blocks = w.columns / 32, stages = (blocks + kStageBlocks - 1) / kStageBlocks;
  // Scales are applied once a group, or once a stage where that is shorter.
  const int span = w.group < 32 * kStageBlocks ? w.group / 32 : kStageBlocks, groups = kStageBlocks / span;
  const long long first_row = static_cast<long long>(expert) * w.rows;

  auto fetch = [&](int stage, int piece) {
    for (int i = 0; i < kRows * kStageBlocks / 32; ++i) {
      const int row = (i * 32 + lane) / kStageBlocks, part = (i * 32 + lane) % kStageBlocks;
      const int block = stage * kStageBlocks + part;
      const bool valid = rows.valid(row) && block < blocks;
      const long long at = (first_row + (valid ? rows.at(row) : 0)) * (w.columns / 2) + (valid ? block * 16 : 0);
      gpu::copy_async(&queue.codes[piece][row][part * 4], w.codes + at, valid);
    }
  };
  auto load_scales = [&](int stage, RawScale(&raw)[kStageBlocks]) {
#pragma unroll
    for (int i = 0; i < kStageBlocks; ++i) {
      const int block = stage * kStageBlocks + i * span;
      raw[i] = {0, 8};
      if (i < groups && block < blocks && rows.valid(lane))
        raw[i] = load_scale(w, (first_row + rows.at(lane)) * (w.columns / w.group) + block * 32 / w.group);
    }
  };
  auto load_column = [&](int block) {
    return column == nullptr ? uint4{0, 0, 0, 0} : *reinterpret_cast<const uint4*>(column + block * 32 + t * 8);
  };

  for (int piece = 0; piece < kStages - 1; ++piece) {
    if (warp + piece * kWarps < stages) fetch(warp + piece * kWarps, piece);
    gpu::commit();
  }
  RawScale raw[kStageBlocks];
  if (warp < stages) load_scales(warp, raw);

  for (int stage = warp, piece = 0; stage < stages; stage += kWarps, piece = (piece + 1) % kStages) {
    gpu::wait<kStages - 2>();
    gpu::sync_warp();  // all copies of this piece have landed, and no lane reads the piece before it any more
    const int next = stage + (kStages - 1) * kWarps;
    if (next < stages) fetch(next, (piece + kStages - 1) % kStages);
    gpu::commit();
#pragma unroll
    for (int i = 0; i < kStageBlocks; ++i) {
      queue.scales[lane][i] = decode_scale(raw[i].scale, w.scale_type);
      if (kCodec == kInt4) queue.biases[lane][i] = int4_bias(raw[i].zero);
    }
    if (stage + kWarps < stages) load_scales(stage + kWarps, raw);
    gpu::sync_warp();

    const int left = blocks - stage * kStageBlocks;
    float part[2][4] = {};
    uint4 x = load_column(stage * kStageBlocks);
#pragma unroll
    for (int b = 0; b < kStageBlocks; ++b) {
      if (b >= left) break;
      // Columns n and n + 4 of every eight side by side, as `decode` has them.
      const uint32_t x0 = gpu::permute(x.x, x.z, 0x5410), x1 = gpu::permute(x.x, x.z, 0x7632);
      const uint32_t x2 = gpu::permute(x.y, x.w, 0x5410), x3 = gpu::permute(x.y, x.w, 0x7632);
      if (b + 1 < kStageBlocks && b + 1 < left) x = load_column(stage * kStageBlocks + b + 1);
      const int i = b / span;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const int upper = tile * 16 + g;
        multiply_block<kCodec>(queue, piece, upper, b, i, x0, x1, x2, x3, part[tile]);
        if ((b + 1) % span == 0 || b + 1 == left) {
          const float s0 = queue.scales[upper][i], s1 = queue.scales[upper + 8][i];
          sums[tile][0] += s0 * part[tile][0];
          sums[tile][1] += s0 * part[tile][1];
          sums[tile][2] += s1 * part[tile][2];
          sums[tile][3] += s1 * part[tile][3];
          part[tile][0] = part[tile][1] = part[tile][2] = part[tile][3] = 0.0f;
        }
      }
    }
  }
}

// Stores the warps' shares next to each other; add_warps sums them.
__device__ void share_sums(const float (&sums)[2][4], Shared& shared) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  gpu::wait<0>();
  gpu::sync_block();  // the queues end here
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int i = 0; i < 4; ++i) shared.sums[warp][tile * 16 + g + i / 2 * 8][2 * t + i % 2] = sums[tile][i];
  gpu::sync_block();
}

__device__ float add_warps(const Shared& shared, int row, int pair) {
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) sum += shared.sums[warp][row][pair];
  return sum;
}

__device__ uint16_t round_to_bf16(float x) {
  const uint32_t bits = gpu::bits_of_float(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// activation[pair] = silu(min(W1 x, limit)) * clamp(W3 x, -limit, limit) * router weight, bf16 [pairs, inner].
// w13 has the rows of W1, then those of W3. Grid: tiles of 16 of the `inner` rows, pairs.
template <int kCodec>
__global__ void __launch_bounds__(32 * kWarps, 2)
    gate_up(Weights w13, Routing routing, const uint16_t* x, uint16_t* activation, float limit) {
  Shared& shared = *static_cast<Shared*>(gpu::shared_memory());
  const int expert = gather_pairs(routing, blockIdx.y, shared), inner = w13.rows / 2, first = blockIdx.x * 16;
  const int count = shared.count;
  if (count == 0) return;
  const int member = threadIdx.x % 32 / 4;
  const uint16_t* column =
      member < count ? x + static_cast<long long>(shared.members[member] / routing.topk) * w13.columns : nullptr;
  float sums[2][4] = {};
  multiply<kCodec>(w13, expert, {first, inner, inner + first, w13.rows}, column, shared.queues[threadIdx.x / 32], sums);
  share_sums(sums, shared);
  for (int i = threadIdx.x; i < 16 * count; i += 32 * kWarps) {
    const int row = i % 16, pair = shared.members[i / 16];
    if (first + row >= inner) continue;
    // Not fminf and fmaxf, which give the limit for NaN.
    const float w1 = add_warps(shared, row, i / 16), w3 = add_warps(shared, 16 + row, i / 16);
    const float gate = w1 > limit ? limit : w1;
    const float up = w3 > limit ? limit : w3 < -limit ? -limit : w3;
    const float value = gate / (1.0f + expf(-gate)) * up * routing.weights[pair];
    activation[static_cast<long long>(pair) * inner + first + row] = round_to_bf16(value);
  }
}

// out[token] = sum over its pairs of W2 activation[pair], fp32 [tokens, hidden]; the last block of each tile adds the
// pairs' products, which the others left in `products`, fp32 [pairs, hidden]. `arrived`: one int per tile, zero before
// and after. Grid: tiles of 32 of the `hidden` rows, pairs.
template <int kCodec>
__global__ void __launch_bounds__(32 * kWarps, 2)
    down(Weights w2, Routing routing, const uint16_t* activation, float* products, int* arrived, float* out) {
  Shared& shared = *static_cast<Shared*>(gpu::shared_memory());
  const int expert = gather_pairs(routing, blockIdx.y, shared), hidden = w2.rows, first = blockIdx.x * kRows;
  const int count = shared.count;
  const bool nothing = shared.held == 0 && blockIdx.y == 0;
  if (count == 0 && !nothing) return;
  if (count > 0) {
    const int member = threadIdx.x % 32 / 4;
    const uint16_t* column =
        member < count ? activation + static_cast<long long>(shared.members[member]) * w2.columns : nullptr;
    float sums[2][4] = {};
    const Rows rows{first, hidden, first + 16, hidden};
    multiply<kCodec>(w2, expert, rows, column, shared.queues[threadIdx.x / 32], sums);
    share_sums(sums, shared);
    for (int i = threadIdx.x; i < kRows * count; i += 32 * kWarps)
      if (first + i % kRows < hidden)
        products[static_cast<long long>(shared.members[i / kRows]) * hidden + first + i % kRows] =
            add_warps(shared, i % kRows, i / kRows);
    gpu::fence();
    gpu::sync_block();
    if (threadIdx.x == 0) {
      shared.last = gpu::add_atomically(&arrived[blockIdx.x], count) + count == shared.held;
      if (shared.last) arrived[blockIdx.x] = 0;
    }
    gpu::sync_block();
    if (!shared.last) return;
    gpu::fence();
  }
  for (int i = threadIdx.x; i < kRows * routing.tokens; i += 32 * kWarps) {
    const int row = first + i % kRows, token = i / kRows;
    if (row >= hidden) continue;
    float sum = 0.0f;
    for (int k = 0; k < routing.topk; ++k) {
      const int pair = token * routing.topk + k;
      const long long id = routing.ids[pair];
      if (id >= routing.first && id < routing.first + routing.experts)
        sum += gpu::load_shared_result(products + static_cast<long long>(pair) * hidden + row);
    }
    out[static_cast<long long>(token) * hidden + row] = sum;
  }
}

template <int kCodec>
int run(const Weights& w13, const Weights& w2, const Routing& routing, const uint16_t* x, uint16_t* activation,
        float* products, int* arrived, float* out, float limit, void* stream) {
  const unsigned pairs = static_cast<unsigned>(routing.tokens * routing.topk);
  const dim3 up_grid((w13.rows / 2 + 15) / 16, pairs), down_grid((w2.rows + kRows - 1) / kRows, pairs);
  const int status = gpu::launch(gate_up<kCodec>, up_grid, 32 * kWarps, sizeof(Shared), stream, w13, routing, x,
                                 activation, limit);
  if (status != 0) return status;
  return gpu::launch(down<kCodec>, down_grid, 32 * kWarps, sizeof(Shared), stream, w2, routing,
                     static_cast<const uint16_t*>(activation), products, arrived, out);
}

}  // namespace

// ops/cuda/library.py's ABI.
constexpr int kAbi = 1;
extern "C" int deepseek_v4flash_abi() { return kAbi; }

// Arguments are those of the kernels; `codec` is that of both weights. Returns a cudaError_t.
extern "C" int deepseek_v4flash_experts(int codec, const Weights* w13, const Weights* w2, const Routing* routing,
                                        const void* x, void* activation, float* products, int* arrived, float* out,
                                        float limit, void* stream) {
  const auto run_codec = codec == kFp4 ? run<kFp4> : run<kInt4>;
  return run_codec(*w13, *w2, *routing, static_cast<const uint16_t*>(x), static_cast<uint16_t*>(activation), products,
                   arrived, out, limit, stream);
}
