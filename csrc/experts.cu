// The routed experts for a few tokens: W2 (silu(W1 x) * W3 x), summed over each token's experts, in three launches.
//
// Decoding reads six experts per token and little else, so both products are built around reading weights once, with
// enough of them on the way (product.cuh). As many blocks start as the GPU holds; their warps take turns at units of 32
// rows, up to 1,024 columns and up to eight (token, expert) pairs of one expert. The warp that finishes last of those
// whose sums belong together adds them up.
//
// Sums have a fixed order: columns within a segment, then segments, then a token's experts as the router listed them.

#include "product.cuh"

namespace {

__device__ uint16_t round_to_bf16(float x) {
  const uint32_t bits = gpu::bits_of_float(x);
  if (x != x) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A warp's sums to `to`[pair * stride + row], for the pairs that exist; `apart` as in `Stream`.
__device__ void store_sums(const float (&sums)[2][4], const Chunk& chunk, float* to, int stride, int apart) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int side = 0; side < 2; ++side) {
    if (2 * t + side >= chunk.count) continue;
    float* at = to + static_cast<long long>(chunk.pairs[2 * t + side]) * stride + g;
    at[0] = sums[0][side], at[8] = sums[0][2 + side];
    at[apart] = sums[1][side], at[apart + 8] = sums[1][2 + side];
  }
}

// For this lane's `condition`, whether it is the last of `all` that come to a counter, which is then zero again. What
// the others stored before they came is visible to the warp afterwards.
__device__ bool arrive(int* counter, int all, bool condition) {
  gpu::fence();
  gpu::sync_warp();
  const bool last = condition && gpu::add_atomically(counter, 1) == all - 1;
  if (last) *counter = 0;
  gpu::sync_warp();
  gpu::fence();
  return last;
}

// One activation from the sums of W1's and W3's rows.
__device__ uint16_t swiglu(float w1, float w3, float limit, float weight) {
  // Not fminf and fmaxf, which give the limit for NaN.
  const float gate = w1 > limit ? limit : w1;
  const float up = w3 > limit ? limit : w3 < -limit ? -limit : w3;
  return round_to_bf16(gate / (1.0f + expf(-gate)) * up * weight);
}

// to.activation[pair] = silu(min(W1 x, limit)) * clamp(W3 x, -limit, limit) * router weight. w13 has the rows of W1, then
// those of W3: a unit has 16 of each.
template <int kFormat>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) gate_up(Weights w13, Routing routing, Buffers to, float limit) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, pairs = routing.tokens * routing.topk;
  Queue& queue = static_cast<Shared*>(gpu::shared_memory())->queues[threadIdx.x / 32];
  const Work work(w13, to.inner / 16, to.plan->count);
  Stream<16> stream(w13, work, to.plan->chunks, to.inner);
  int piece = 0;
  for (int i = 0; i < kStages - 1; ++i) stream.fetch(queue, i);
  for (Unit unit = work.first(); unit.chunk < work.chunks; work.advance(unit)) {
    const Chunk& chunk = to.plan->chunks[unit.chunk];
    const uint16_t* x = to.rows + static_cast<long long>(chunk.tokens[g]) * padded(to.hidden);
    float sums[2][4] = {};
    multiply<kFormat>(unit, stream, x + unit.segment * w13.segment, queue, piece, sums);
    const int first = unit.tile * 16;
    if (work.segments > 1) {
      const long long segment = 2ll * pairs * to.inner;
      store_sums(sums, chunk, to.halves + unit.segment * segment + first, 2 * to.inner, to.inner);
      const bool last = arrive(to.arrived + unit.chunk * work.tiles + unit.tile, work.segments, lane == 0);
      if (!gpu::broadcast(last, 0)) continue;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int side = i % 2, row = first + g + i % 4 / 2 * 8 + i / 4 * to.inner;
        sums[i / 4][i % 4] = 0.0f;
        if (2 * t + side >= chunk.count) continue;
        const float* from = to.halves + 2ll * chunk.pairs[2 * t + side] * to.inner + row;
        for (int s = 0; s < work.segments; ++s) sums[i / 4][i % 4] += gpu::load_shared_result(from + s * segment);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (2 * t + i % 2 >= chunk.count) continue;
      const long long pair = chunk.pairs[2 * t + i % 2];
      to.activation[pair * padded(to.inner) + place_of(first + g + i / 2 * 8, to.narrow2)] =
          swiglu(sums[0][i], sums[1][i], limit, routing.weights[pair]);
    }
  }
  gpu::wait<0>();
}

// out[token] = the sum over its pairs of W2 activation[pair]: the warp that stores the last of a token's products for a
// tile adds them.
template <int kFormat>
__global__ void __launch_bounds__(32 * kWarps, kBlocks) down(Weights w2, Routing routing, Buffers to) {
  const int lane = threadIdx.x % 32, pairs = routing.tokens * routing.topk;
  Queue& queue = static_cast<Shared*>(gpu::shared_memory())->queues[threadIdx.x / 32];
  const Work work(w2, to.hidden / kRows, to.plan->count);
  Stream<kRows> stream(w2, work, to.plan->chunks, 16);
  const long long segment = static_cast<long long>(pairs) * to.hidden;
  int piece = 0;
  for (int i = 0; i < kStages - 1; ++i) stream.fetch(queue, i);
  for (Unit unit = work.first(); unit.chunk < work.chunks; work.advance(unit)) {
    const Chunk& chunk = to.plan->chunks[unit.chunk];
    const uint16_t* x = to.activation + static_cast<long long>(chunk.pairs[lane / 4]) * padded(to.inner);
    float sums[2][4] = {};
    multiply<kFormat>(unit, stream, x + unit.segment * w2.segment, queue, piece, sums);
    const int row = unit.tile * kRows + lane;
    store_sums(sums, chunk, to.products + unit.segment * segment + unit.tile * kRows, to.hidden, 16);
    const bool mine = lane < chunk.count;
    const int token = mine ? chunk.tokens[lane] : 0;
    const int all = gpu::count_bits(to.plan->held[token]) * work.segments;
    int* counter = to.arrived + pairs * (to.inner / 16) + token * work.tiles + unit.tile;
    for (uint32_t complete = gpu::ballot(arrive(counter, all, mine)); complete != 0; complete &= complete - 1) {
      const int done = gpu::broadcast(token, gpu::lowest_bit(complete)), held = to.plan->held[done];
      const float* from = to.products + static_cast<long long>(done) * routing.topk * to.hidden + row;
      float sum = 0.0f;
      for (int k = 0; k < routing.topk; ++k) {
        if (!(held >> k & 1)) continue;
        float product = 0.0f;
        for (int s = 0; s < work.segments; ++s)
          product += gpu::load_shared_result(from + s * segment + static_cast<long long>(k) * to.hidden);
        sum += product;
      }
      to.out[static_cast<long long>(done) * to.hidden + row] = sum;
    }
  }
  gpu::wait<0>();
}

// As many blocks as the GPU holds, or as have work at most.
template <auto kKernel>
int blocks_for(const Weights& w, int tiles, int pairs) {
  const int resident = gpu::resident_blocks<kKernel>(32 * kWarps, sizeof(Shared));
  const long long units = static_cast<long long>((w.columns + w.segment - 1) / w.segment) * tiles * pairs;
  const long long blocks = (units + kWarps - 1) / kWarps;
  return blocks < resident ? static_cast<int>(blocks) : resident;
}

template <int kFormat>
int start_gate_up(const Weights& w13, const Routing& routing, const Buffers& to, float limit, void* stream) {
  const int blocks = blocks_for<gate_up<kFormat>>(w13, to.inner / 16, routing.tokens * routing.topk);
  if (blocks < 0) return -blocks;
  return gpu::launch(gate_up<kFormat>, blocks, 32 * kWarps, sizeof(Shared), stream, w13, routing, to, limit);
}

template <int kFormat>
int start_down(const Weights& w2, const Routing& routing, const Buffers& to, void* stream) {
  const int blocks = blocks_for<down<kFormat>>(w2, to.hidden / kRows, routing.tokens * routing.topk);
  if (blocks < 0) return -blocks;
  return gpu::launch(down<kFormat>, blocks, 32 * kWarps, sizeof(Shared), stream, w2, routing, to);
}

constexpr decltype(&start_gate_up<kFp4>) kGateUp[] = {start_gate_up<kInt4>, start_gate_up<kInt4Zeros>,
                                                      start_gate_up<kInt4Narrow>, start_gate_up<kInt4NarrowZeros>,
                                                      start_gate_up<kFp4>};
constexpr decltype(&start_down<kFp4>) kDown[] = {start_down<kInt4>, start_down<kInt4Zeros>, start_down<kInt4Narrow>,
                                                 start_down<kInt4NarrowZeros>, start_down<kFp4>};

}  // namespace

// ops/cuda/library.py's ABI.
constexpr int kAbi = 2;
extern "C" int deepseek_v4flash_abi() { return kAbi; }

// 0 where this machine's GPU and driver run these kernels, or a cudaError_t.
extern "C" int deepseek_v4flash_probe() {
  const int blocks = gpu::resident_blocks<gate_up<kInt4>>(32 * kWarps, sizeof(Shared));
  return blocks < 0 ? -blocks : 0;
}

// Arguments are those of the kernels; the formats are those of the weights. Returns a cudaError_t.
extern "C" int deepseek_v4flash_experts(int format13, int format2, const Weights* w13, const Weights* w2,
                                        const Routing* routing, const Buffers* to, float limit, void* stream) {
  int status = gpu::launch(prepare, routing->tokens + 2, kPrepareThreads, sizeof(PrepareShared), stream, *routing, *to);
  if (status == 0) status = kGateUp[format13](*w13, *routing, *to, limit, stream);
  return status == 0 ? kDown[format2](*w2, *routing, *to, stream) : status;
}
