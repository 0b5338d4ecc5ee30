// Loads, stores, ldmatrix, stmatrix and atomics.
#include "memory.h"

#include <algorithm>

namespace {

// Loads and stores of `vector` values of `size` bytes. Operands of a load: the values, the base; of a store: the base,
// the values. Registers may be wider than a value.

void put(uint8_t* to, const uint8_t* from, int size, int width, bool is_signed) {
  int64_t value = 0;
  std::memcpy(&value, from, size);
  if (is_signed && size < 8) value = value << (64 - 8 * size) >> (64 - 8 * size);
  std::memcpy(to, &value, width);
}

template <int kSize>
void load_exact(Warp& w, const Instruction& in, const uint64_t* addresses, Mask active) {
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const uint8_t* from = locate(w, in, i, addresses[i], kSize * in.vector, false);
    for (int v = 0; v < in.vector; ++v) {
      if (in.operand[v] == kNone) continue;
      uint8_t* to = w.registers + in.operand[v] + i * kSize;
      if (from) std::memcpy(to, from + v * kSize, kSize);
      else std::memset(to, 0xA5, kSize);
    }
  }
}

void load(Warp& w, const Instruction& in, Mask active) {
  uint64_t addresses[kLanes];
  gather_addresses(w, in, in.vector, addresses);
  count_access(w, in, addresses, in.size * in.vector, active);
  bool exact = true;
  for (int v = 0; v < in.vector; ++v) exact &= in.width[v] == in.size;
  if (exact && in.size == 4) return load_exact<4>(w, in, addresses, active);
  if (exact && in.size == 8) return load_exact<8>(w, in, addresses, active);
  if (exact && in.size == 2) return load_exact<2>(w, in, addresses, active);
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const uint8_t* from = locate(w, in, i, addresses[i], in.size * in.vector, false);
    for (int v = 0; v < in.vector; ++v) {
      if (in.operand[v] == kNone) continue;
      uint8_t* to = w.registers + in.operand[v] + i * in.width[v];
      if (from) put(to, from + v * in.size, in.size, in.width[v], in.is_signed);
      else std::memset(to, 0xA5, in.width[v]);
    }
  }
}

void load_parameter(Warp& w, const Instruction& in, Mask active) {
  for (int v = 0; v < in.vector; ++v)
    for (Mask left = active; left; left &= left - 1) {
      const int i = __builtin_ctz(left);
      put(w.registers + in.operand[v] + i * in.width[v], w.launch->parameters + in.immediate + v * in.size, in.size,
          in.width[v], in.is_signed);
    }
}

void store(Warp& w, const Instruction& in, Mask active) {
  uint64_t addresses[kLanes];
  gather_addresses(w, in, 0, addresses);
  count_access(w, in, addresses, in.size * in.vector, active);
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    uint8_t value[16];
    for (int v = 0; v < in.vector; ++v)
      std::memcpy(value + v * in.size, w.registers + in.operand[1 + v] + i * in.width[1 + v], in.size);
    if (uint8_t* to = locate(w, in, i, addresses[i], in.size * in.vector, true, value))
      std::memcpy(to, value, in.size * in.vector);
  }
}

// ldmatrix: lane 8m + r has the address of row r of matrix m; a row is eight values of 16 bits.
void load_matrix(Warp& w, const Instruction& in, Mask active) {
  if (active != kAllLanes) report(w, in, kDivergentWarpOperation, 0, active);
  uint64_t addresses[kLanes];
  const int count_ = in.vector;
  gather_addresses(w, in, count_, addresses);
  Stat& s = stat(w, in);
  uint16_t rows[4][8][8] = {};
  for (int i = 0; i < 8 * count_; ++i)
    if (const uint8_t* from = locate(w, in, i, addresses[i], 16, false)) std::memcpy(rows[i / 8][i % 8], from, 16);
  for (int m = 0; m < count_; ++m) {
    count_shared(s, addresses, 16, 0xFFu << (8 * m));
    uint32_t* to = operand<uint32_t>(w, in, m);
    for (int i = 0; i < kLanes; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      to[i] = in.modifier ? rows[m][column][row] | uint32_t(rows[m][column + 1][row]) << 16
                          : rows[m][row][column] | uint32_t(rows[m][row][column + 1]) << 16;
    }
  }
}

// stmatrix: the reverse.
void store_matrix(Warp& w, const Instruction& in, Mask active) {
  if (active != kAllLanes) report(w, in, kDivergentWarpOperation, 0, active);
  uint64_t addresses[kLanes];
  gather_addresses(w, in, 0, addresses);
  for (int m = 0; m < in.vector; ++m) {
    uint16_t rows[8][8];
    const uint32_t* from = operand<uint32_t>(w, in, 1 + m);
    for (int i = 0; i < kLanes; ++i) {
      const int row = i / 4, column = i % 4 * 2;
      if (in.modifier) rows[column][row] = uint16_t(from[i]), rows[column + 1][row] = uint16_t(from[i] >> 16);
      else rows[row][column] = uint16_t(from[i]), rows[row][column + 1] = uint16_t(from[i] >> 16);
    }
    for (int r = 0; r < 8; ++r)
      if (uint8_t* to = locate(w, in, 8 * m + r, addresses[8 * m + r], 16, true, reinterpret_cast<uint8_t*>(rows[r])))
        std::memcpy(to, rows[r], 16);
    count_shared(stat(w, in), addresses, 16, 0xFFu << (8 * m));
  }
}

// Atomics, lane by lane. Operands: the old value (where there is one), the base, the value, for cas another.
template <class T, class F>
void atomic(Warp& w, const Instruction& in, Mask active) {
  const int base = in.vector;  // 1: atom, 0: red
  uint64_t addresses[kLanes];
  gather_addresses(w, in, base, addresses);
  count_access(w, in, addresses, sizeof(T), active);
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    // Atomics on shared memory do not race with one another; other accesses to the same bytes are not checked.
    const bool checked = w.block->checked;
    w.block->checked = false;
    uint8_t* at = locate(w, in, i, addresses[i], sizeof(T), true);
    w.block->checked = checked;
    if (!at) continue;
    T old, value = operand<T>(w, in, base + 1)[i];
    std::memcpy(&old, at, sizeof(T));
    const T third = in.operands > base + 2 ? operand<T>(w, in, base + 2)[i] : T();
    const T now = F::of(old, value, third);
    std::memcpy(at, &now, sizeof(T));
    if (base == 1 && in.operand[0] != kNone) operand<T>(w, in, 0)[i] = old;
  }
}
#define ATOMIC_OP(name, expression)                                  \
  struct name {                                                      \
    template <class T>                                               \
    static T of([[maybe_unused]] T old, T value, [[maybe_unused]] T third) { return expression; } \
  };
ATOMIC_OP(AAdd, T(old + value))
ATOMIC_OP(AMin, value < old ? value : old)
ATOMIC_OP(AMax, value > old ? value : old)
ATOMIC_OP(AExch, value)
ATOMIC_OP(ACas, old == value ? third : old)
ATOMIC_OP(AAnd, old & value)
ATOMIC_OP(AOr, old | value)
ATOMIC_OP(AXor, old ^ value)

void nothing(Warp&, const Instruction&, Mask) {}
void sync_warp(Warp& w, const Instruction& in, Mask active) {
  const uint32_t mask = operand<uint32_t>(w, in, 0)[__builtin_ctz(active)];
  if (mask & w.live & ~active) report(w, in, kDivergentWarpOperation, 0, active);
  ++w.epoch;
}

#define ATOMICS(t, T)                                                                           \
  {"atom.add." t, atomic<T, AAdd>}, {"atom.min." t, atomic<T, AMin>}, {"atom.max." t, atomic<T, AMax>}, \
      {"atom.exch." t, atomic<T, AExch>}, {"atom.cas." t, atomic<T, ACas>}
#define ATOMIC_BITS(t, T) \
  {"atom.and." t, atomic<T, AAnd>}, {"atom.or." t, atomic<T, AOr>}, {"atom.xor." t, atomic<T, AXor>}, \
      {"atom.exch." t, atomic<T, AExch>}, {"atom.cas." t, atomic<T, ACas>}

const Entry kEntries[] = {
    {"ld", load}, {"ld.param", load_parameter}, {"st", store}, {"ldmatrix", load_matrix},
    {"stmatrix", store_matrix}, {"nothing", nothing}, {"bar.warp.sync", sync_warp},
    ATOMICS("u32", uint32_t), ATOMICS("s32", int32_t), ATOMICS("u64", uint64_t), ATOMICS("s64", int64_t),
    ATOMICS("f32", float), ATOMIC_BITS("b32", uint32_t), ATOMIC_BITS("b64", uint64_t),
};

}  // namespace

Handler find_memory(const std::string& name) { return find_in(kEntries, name); }
