// Which (token, expert) pairs are multiplied together, and their activations in the order of the matrix unit: found
// once for both products.
#pragma once

#include "gpu.cuh"

// `tokens` x `topk` pairs; experts outside [first, first + experts) are other ranks'.
struct Routing {
  const long long* ids;  // [tokens, topk]
  const float* weights;  // [tokens, topk]
  int tokens, topk, first, experts;
};

constexpr int kMostTokens = 32;  // and as many experts of a token, a bit for each
constexpr int kPairs = 8;        // of a chunk, at most: the matrix unit's short side

// Pairs of one expert. Those that it lacks of eight stand for a row of zeros, behind those of all pairs and tokens.
struct Chunk {
  int pairs[kPairs], tokens[kPairs];
  int expert;  // counted from the first
  int count, padding[2];
};

struct Plan {
  int count;              // of chunks
  int held[kMostTokens];  // bit k: whether the k-th expert of this token's list is held
  int padding[3];
  Chunk chunks[1];  // as many as there are pairs, at most
};

__device__ __forceinline__ bool is_held(const Routing& routing, long long id) {
  return id >= routing.first && id < routing.first + routing.experts;
}

// Where column `c` of a row of activations is: every 16 bytes have eight columns as `decode_int4` and `decode_fp4` pair
// them; four lanes next to each other find theirs next to each other. `narrow` tells which lane has which columns.
__device__ __forceinline__ int place_of(int c, bool narrow) {
  const int part = narrow ? c % 128 / 8 : c % 32 / 8 * 4 + c % 128 / 32;
  return c / 128 * 128 + part * 8 + c % 4 * 2 + c % 8 / 4;
}

// Rows of activations end in zeros at a whole number of a warp's stages.
constexpr int kStageColumns = 256;
__device__ __forceinline__ int padded(int columns) {
  return (columns + kStageColumns - 1) / kStageColumns * kStageColumns;
}

// Where the launches of a step leave what the later ones need.
struct Buffers {
  const uint16_t* x;     // [tokens, hidden]
  Plan* plan;
  uint16_t* rows;        // [tokens + 1, padded(hidden)]: x, each row in the order of `place_of`, and a row of zeros
  uint16_t* activation;  // [pairs + 1, padded(inner)], likewise
  float* halves;         // [segments of w13, pairs, 2 inner]
  float* products;       // [segments of w2, pairs, hidden]
  int* arrived;          // [pairs, tiles of w13], then [tokens, tiles of w2]; zero before and after
  float* out;            // [tokens, hidden]
  int hidden, inner;
  int narrow13, narrow2;  // whether the weights' groups are
};

namespace {

constexpr int kPrepareThreads = 256;
constexpr int kMostPairs = kMostTokens * 32;

struct PrepareShared {
  int experts[kMostPairs];  // of each pair, or -1
  int first[kMostPairs];    // whether a chunk starts with it
};
static_assert(sizeof(PrepareShared) == 8192);

// A chunk starts with every eighth pair of an expert.
__device__ void plan_chunks(const Routing& routing, Plan& plan, PrepareShared& shared) {
  const int pairs = routing.tokens * routing.topk;
  for (int i = threadIdx.x; i < pairs; i += kPrepareThreads) {
    const long long id = routing.ids[i];
    shared.experts[i] = is_held(routing, id) ? static_cast<int>(id - routing.first) : -1;
  }
  gpu::sync_block();
  for (int i = threadIdx.x; i < pairs; i += kPrepareThreads) {
    int before = 0;
    for (int j = 0; j < i; ++j) before += shared.experts[j] == shared.experts[i];
    shared.first[i] = shared.experts[i] >= 0 && before % kPairs == 0;
  }
  gpu::sync_block();
  for (int i = threadIdx.x; i < pairs; i += kPrepareThreads) {
    int chunks = 0;
    for (int j = 0; j < i; ++j) chunks += shared.first[j];
    if (i == pairs - 1) plan.count = chunks + shared.first[i];
    if (!shared.first[i]) continue;
    Chunk& chunk = plan.chunks[chunks];
    int count = 0;
    for (int j = i; j < pairs && count < kPairs; ++j) {
      if (shared.experts[j] != shared.experts[i]) continue;
      chunk.pairs[count] = j;
      chunk.tokens[count++] = j / routing.topk;
    }
    chunk.expert = shared.experts[i];
    chunk.count = count;
    for (; count < kPairs; ++count) chunk.pairs[count] = pairs, chunk.tokens[count] = routing.tokens;
  }
}

__device__ void clear(uint16_t* row, int from, int to, bool narrow) {
  for (int c = from + threadIdx.x; c < to; c += kPrepareThreads) row[place_of(c, narrow)] = 0;
}

// A token's activations in order; its experts that are held, and zeros for its sum where there is none.
__device__ void prepare_token(const Routing& routing, const Buffers& to, int token) {
  const uint4* from = reinterpret_cast<const uint4*>(to.x + static_cast<long long>(token) * to.hidden);
  uint16_t* row = to.rows + static_cast<long long>(token) * padded(to.hidden);
  for (int i = threadIdx.x; i < to.hidden / 8; i += kPrepareThreads) {
    const uint4 x = from[i];
    const uint4 paired{gpu::permute(x.x, x.z, 0x5410), gpu::permute(x.x, x.z, 0x7632), gpu::permute(x.y, x.w, 0x5410),
                       gpu::permute(x.y, x.w, 0x7632)};
    *reinterpret_cast<uint4*>(row + place_of(8 * i, to.narrow13)) = paired;
  }
  clear(row, to.hidden, padded(to.hidden), to.narrow13);
  uint32_t held = 0;
  for (int k = 0; k < routing.topk; ++k) {
    const int pair = token * routing.topk + k;
    held |= static_cast<uint32_t>(is_held(routing, routing.ids[pair])) << k;
    clear(to.activation + static_cast<long long>(pair) * padded(to.inner), to.inner, padded(to.inner), to.narrow2);
  }
  if (threadIdx.x == 0) to.plan->held[token] = static_cast<int>(held);
  if (held == 0)
    for (int c = threadIdx.x; c < to.hidden; c += kPrepareThreads)
      to.out[static_cast<long long>(token) * to.hidden + c] = 0.0f;
}

// The first launch of a step. Blocks: the tokens, one for the rows of zeros, one for the plan.
__global__ void __launch_bounds__(kPrepareThreads) prepare(Routing routing, Buffers to) {
  const int block = blockIdx.x, tokens = routing.tokens;
  if (block < tokens) {
    prepare_token(routing, to, block);
  } else if (block == tokens) {
    const long long pairs = static_cast<long long>(tokens) * routing.topk;
    clear(to.rows + static_cast<long long>(tokens) * padded(to.hidden), 0, padded(to.hidden), to.narrow13);
    clear(to.activation + pairs * padded(to.inner), 0, padded(to.inner), to.narrow2);
  } else {
    plan_chunks(routing, *to.plan, *static_cast<PrepareShared*>(gpu::shared_memory()));
  }
}

}  // namespace
