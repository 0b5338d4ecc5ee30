// What the lanes of a warp do together: shuffles, votes, reductions and matrix products.
#include <algorithm>

#include "machine.h"
#include "numbers.h"

namespace {

void check_members(Warp& w, const Instruction& in, int mask_operand, Mask active) {
  const Mask members = operand<uint32_t>(w, in, mask_operand)[__builtin_ctz(active)];
  if ((members & w.live) != active) report(w, in, kDivergentWarpOperation, __builtin_ctz(active), members);
}

// shfl.sync.mode d{|p}, a, b, c, mask. `modifier`: 0 up, 1 down, 2 bfly, 3 idx; `vector`: 2 where there is a p.
void shuffle(Warp& w, const Instruction& in, Mask active) {
  const int first = in.vector;
  check_members(w, in, first + 3, active);
  const uint32_t *a = operand<uint32_t>(w, in, first), *b = operand<uint32_t>(w, in, first + 1),
                 *c = operand<uint32_t>(w, in, first + 2);
  uint32_t result[kLanes];
  Mask in_range = 0;
  for (int i = 0; i < kLanes; ++i) {
    const int clamp = c[i] & 31, segment = c[i] >> 8 & 31, value = b[i] & 31;
    const int highest = (i & segment) | (clamp & ~segment), lowest = i & segment;
    int from = i;
    bool valid = false;
    switch (in.modifier) {
      case 0: from = i - value; valid = from >= highest; break;
      case 1: from = i + value; valid = from <= highest; break;
      case 2: from = i ^ value; valid = from <= highest; break;
      case 3: from = lowest | (value & ~segment); valid = from <= highest; break;
    }
    if (!valid) from = i;
    if ((active >> i & 1) && !(active >> from & 1)) report(w, in, kDivergentWarpOperation, i, from);
    result[i] = a[from];
    in_range |= Mask(valid) << i;
  }
  if (in.operand[0] != kNone) commit(operand<uint32_t>(w, in, 0), result, active);
  if (in.vector == 2) {
    Mask& p = predicate(w, in.operand[1]);
    p = (p & ~active) | (in_range & active);
  }
}

// vote.sync d, p, mask. `modifier`: 0 ballot, 1 any, 2 all, 3 uni.
void vote(Warp& w, const Instruction& in, Mask active) {
  check_members(w, in, 2, active);
  const Mask p = predicate(w, in.operand[1]) & active;
  if (in.modifier == 0) {
    uint32_t result[kLanes];
    std::fill(result, result + kLanes, p);
    commit(operand<uint32_t>(w, in, 0), result, active);
    return;
  }
  const bool holds = in.modifier == 1 ? p != 0 : in.modifier == 2 ? p == active : p == 0 || p == active;
  Mask& d = predicate(w, in.operand[0]);
  d = (d & ~active) | (holds ? active : 0);
}

template <class T, class F>
void reduce(Warp& w, const Instruction& in, Mask active) {
  check_members(w, in, 2, active);
  const T* a = operand<T>(w, in, 1);
  T total = a[__builtin_ctz(active)];
  for (Mask left = active & (active - 1); left; left &= left - 1) total = F::of(total, a[__builtin_ctz(left)]);
  T result[kLanes];
  std::fill(result, result + kLanes, total);
  commit(operand<T>(w, in, 0), result, active);
}
struct RAdd { template <class T> static T of(T a, T b) { return T(uint32_t(a) + uint32_t(b)); } };
struct RMin { template <class T> static T of(T a, T b) { return std::min(a, b); } };
struct RMax { template <class T> static T of(T a, T b) { return std::max(a, b); } };
struct RAnd { template <class T> static T of(T a, T b) { return a & b; } };
struct ROr { template <class T> static T of(T a, T b) { return a | b; } };
struct RXor { template <class T> static T of(T a, T b) { return a ^ b; } };

void active_mask(Warp& w, const Instruction& in, Mask active) {
  uint32_t result[kLanes];
  std::fill(result, result + kLanes, active);
  commit(operand<uint32_t>(w, in, 0), result, active);
}

// elect.sync d|p, mask: the lowest lane of the mask.
void elect(Warp& w, const Instruction& in, Mask active) {
  const Mask members = operand<uint32_t>(w, in, 2)[__builtin_ctz(active)];
  const uint32_t leader = __builtin_ctz(members);
  uint32_t result[kLanes];
  std::fill(result, result + kLanes, leader);
  if (in.operand[0] != kNone) commit(operand<uint32_t>(w, in, 0), result, active);
  Mask& p = predicate(w, in.operand[1]);
  p = (p & ~active) | (active & (1u << leader));
}

void match_any(Warp& w, const Instruction& in, Mask active) {
  check_members(w, in, 2, active);
  const uint32_t* a = operand<uint32_t>(w, in, 1);
  uint32_t result[kLanes] = {};
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < kLanes; ++j)
      if ((active >> j & 1) && a[i] == a[j]) result[i] |= 1u << j;
  commit(operand<uint32_t>(w, in, 0), result, active);
}

// mma m16n8 with the PTX ISA's fragments. Products are exact, and sums are rounded to fp32 one by one, k ascending; a
// GPU adds several at once and truncates, which differs in the last bits.
struct Tf32 {
  static constexpr int kPerRegister = 1;
  static float value(uint32_t bits, int) { return float_of(bits & 0xFFFFE000u); }
};
template <class Format>
struct Halves {
  static constexpr int kPerRegister = 2;
  static float value(uint32_t bits, int i) { return Format::unpack(uint16_t(bits >> (16 * i))); }
};
struct E4m3s {
  static constexpr int kPerRegister = 4;
  static float value(uint32_t bits, int i) { return E4m3::unpack(uint8_t(bits >> (8 * i))); }
};

template <class Elements, int kDepth>
void mma(Warp& w, const Instruction& in, Mask active) {
  if (active != kAllLanes) report(w, in, kDivergentWarpOperation, 0, active);
  constexpr int kPer = Elements::kPerRegister, kHalves = kDepth / (4 * kPer), kA = 2 * kHalves;
  alignas(32) float a[16][kDepth], b[kDepth][8], c[16][8];
  for (int h = 0; h < kHalves; ++h)
    for (int r = 0; r < 2; ++r) {
      const uint32_t* from = operand<uint32_t>(w, in, 4 + 2 * h + r);
      for (int i = 0; i < kLanes; ++i)
        for (int e = 0; e < kPer; ++e)
          a[i / 4 + 8 * r][h * 4 * kPer + i % 4 * kPer + e] = Elements::value(from[i], e);
    }
  for (int h = 0; h < kHalves; ++h) {
    const uint32_t* from = operand<uint32_t>(w, in, 4 + kA + h);
    for (int i = 0; i < kLanes; ++i)
      for (int e = 0; e < kPer; ++e) b[h * 4 * kPer + i % 4 * kPer + e][i / 4] = Elements::value(from[i], e);
  }
  for (int r = 0; r < 4; ++r) {
    const float* from = operand<float>(w, in, 4 + kA + kHalves + r);
    for (int i = 0; i < kLanes; ++i) c[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2] = from[i];
  }
  for (int m = 0; m < 16; ++m) {
    __m256 sum = _mm256_load_ps(c[m]);
    for (int k = 0; k < kDepth; ++k) sum = _mm256_fmadd_ps(_mm256_set1_ps(a[m][k]), _mm256_load_ps(b[k]), sum);
    _mm256_store_ps(c[m], sum);
  }
  for (int r = 0; r < 4; ++r) {
    float* to = operand<float>(w, in, r);
    for (int i = 0; i < kLanes; ++i) to[i] = c[i / 4 + r / 2 * 8][i % 4 * 2 + r % 2];
  }
}

const Entry kEntries[] = {
    {"shfl", shuffle}, {"vote", vote}, {"activemask.b32", active_mask}, {"elect.sync", elect},
    {"match.any.sync.b32", match_any},
    {"redux.sync.add.s32", reduce<int32_t, RAdd>}, {"redux.sync.add.u32", reduce<uint32_t, RAdd>},
    {"redux.sync.min.s32", reduce<int32_t, RMin>}, {"redux.sync.min.u32", reduce<uint32_t, RMin>},
    {"redux.sync.max.s32", reduce<int32_t, RMax>}, {"redux.sync.max.u32", reduce<uint32_t, RMax>},
    {"redux.sync.and.b32", reduce<uint32_t, RAnd>}, {"redux.sync.or.b32", reduce<uint32_t, ROr>},
    {"redux.sync.xor.b32", reduce<uint32_t, RXor>},
    {"mma.m16n8k16.f32.bf16.bf16.f32", mma<Halves<Bf16>, 16>}, {"mma.m16n8k16.f32.f16.f16.f32", mma<Halves<Fp16>, 16>},
    {"mma.m16n8k8.f32.bf16.bf16.f32", mma<Halves<Bf16>, 8>}, {"mma.m16n8k8.f32.f16.f16.f32", mma<Halves<Fp16>, 8>},
    {"mma.m16n8k8.f32.tf32.tf32.f32", mma<Tf32, 8>}, {"mma.m16n8k4.f32.tf32.tf32.f32", mma<Tf32, 4>},
    {"mma.m16n8k32.f32.e4m3.e4m3.f32", mma<E4m3s, 32>},
};

}  // namespace

Handler find_collective(const std::string& name) { return find_in(kEntries, name); }
