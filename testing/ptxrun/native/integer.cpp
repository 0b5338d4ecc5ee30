// Integer arithmetic and bit manipulation.
#include "lanewise.h"

namespace {

LANE_OP(Add, T, (T a, T b) { return T(Unsigned<T>(a) + Unsigned<T>(b)); })
LANE_OP(Sub, T, (T a, T b) { return T(Unsigned<T>(a) - Unsigned<T>(b)); })
LANE_OP(Mul, T, (T a, T b) { return T(uint64_t(a) * uint64_t(b)); })
LANE_OP(Mad, T, (T a, T b, T c) { return T(uint64_t(a) * uint64_t(b) + uint64_t(c)); })
LANE_OP(Min, T, (T a, T b) { return a < b ? a : b; })
LANE_OP(Max, T, (T a, T b) { return a > b ? a : b; })
LANE_OP(And, T, (T a, T b) { return a & b; })
LANE_OP(Or, T, (T a, T b) { return a | b; })
LANE_OP(Xor, T, (T a, T b) { return a ^ b; })
LANE_OP(Not, T, (T a) { return T(~a); })
LANE_OP(Neg, T, (T a) { return T(0 - Unsigned<T>(a)); })
LANE_OP(Abs, T, (T a) { return a < 0 ? T(0 - Unsigned<T>(a)) : a; })
LANE_OP(Div, T, (T a, T b) {
  if (b == 0) return T(-1);
  if (std::is_signed_v<T> && b == T(-1)) return T(0 - Unsigned<T>(a));
  return T(a / b);
})
LANE_OP(Rem, T, (T a, T b) {
  if (b == 0) return a;
  if (std::is_signed_v<T> && b == T(-1)) return T(0);
  return T(a % b);
})
struct MulHi {
  static int16_t of(int16_t a, int16_t b) { return int16_t(int32_t(a) * b >> 16); }
  static uint16_t of(uint16_t a, uint16_t b) { return uint16_t(uint32_t(a) * b >> 16); }
  static int32_t of(int32_t a, int32_t b) { return int32_t(int64_t(a) * b >> 32); }
  static uint32_t of(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
  static int64_t of(int64_t a, int64_t b) { return int64_t(__int128(a) * b >> 64); }
  static uint64_t of(uint64_t a, uint64_t b) { return uint64_t((unsigned __int128)a * b >> 64); }
};
template <class D>
struct MulWide {
  template <class S>
  static D of(S a, S b) { return D(a) * D(b); }
};
template <class D>
struct MadWide {
  template <class S>
  static D of(S a, S b, D c) { return D(uint64_t(D(a) * D(b)) + uint64_t(c)); }
};
struct Shl {
  template <class T>
  static T of(T a, uint32_t n) { return n < 8 * sizeof(T) ? T(a << n) : T(0); }
};
struct Shr {
  template <class T>
  static T of(T a, uint32_t n) {
    if (n < 8 * sizeof(T)) return T(a >> n);
    return std::is_signed_v<T> && a < 0 ? T(-1) : T(0);
  }
};
struct Bfe {
  template <class T>
  static T of(T a, uint32_t at, uint32_t length) {
    constexpr uint32_t bits = 8 * sizeof(T);
    using U = Unsigned<T>;
    at &= 255, length &= 255;
    if (length == 0) return 0;
    const uint32_t top = at + length - 1 < bits - 1 ? at + length - 1 : bits - 1;
    const U sign = std::is_signed_v<T> && (U(a) >> top & 1) ? ~U(0) : U(0);
    if (at >= bits) return T(sign);
    const uint32_t held = bits - at < length ? bits - at : length;
    const U mask = held < bits ? (U(1) << held) - 1 : ~U(0);
    return T((U(a) >> at & mask) | (sign & ~mask));
  }
};
struct Bfi {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t at, uint32_t length) {
    at &= 255, length &= 255;
    if (length == 0 || at >= 32) return b;
    const uint32_t ones = length >= 32 ? ~0u : (1u << length) - 1;
    return (b & ~(ones << at)) | (a & ones) << at;
  }
};
struct Prmt {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t select) {
    const uint64_t bytes = uint64_t(b) << 32 | a;
    uint32_t result = 0;
    for (int i = 0; i < 4; ++i) {
      const uint32_t s = select >> (4 * i) & 15;
      uint32_t byte = uint32_t(bytes >> (8 * (s & 7))) & 0xFF;
      if (s & 8) byte = byte & 0x80 ? 0xFF : 0;
      result |= byte << (8 * i);
    }
    return result;
  }
};
struct Lop3 {
  static uint32_t of(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
    uint32_t result = 0;
    for (uint32_t i = 0; i < 8; ++i)
      if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
    return result;
  }
};
struct FunnelLeft {
  static uint32_t of(uint32_t low, uint32_t high, uint32_t n) {
    return uint32_t(((uint64_t(high) << 32 | low) << (n & 31)) >> 32);
  }
};
struct FunnelRight {
  static uint32_t of(uint32_t low, uint32_t high, uint32_t n) {
    return uint32_t((uint64_t(high) << 32 | low) >> (n & 31));
  }
};
struct Popc {
  static uint32_t of(uint32_t a) { return __builtin_popcount(a); }
  static uint32_t of(uint64_t a) { return __builtin_popcountll(a); }
};
struct Clz {
  static uint32_t of(uint32_t a) { return a ? __builtin_clz(a) : 32; }
  static uint32_t of(uint64_t a) { return a ? __builtin_clzll(a) : 64; }
};
struct Bfind {
  static uint32_t of(uint32_t a) { return a ? 31 - __builtin_clz(a) : ~0u; }
};
struct Brev {
  static uint32_t of(uint32_t a) {
    uint32_t result = 0;
    for (int i = 0; i < 32; ++i) result |= (a >> i & 1) << (31 - i);
    return result;
  }
};

#define INTEGER(name, F)                                                                              \
  {name ".s16", each<F, int16_t, int16_t, int16_t>}, {name ".u16", each<F, uint16_t, uint16_t, uint16_t>}, \
      {name ".s32", each<F, int32_t, int32_t, int32_t>}, {name ".u32", each<F, uint32_t, uint32_t, uint32_t>}, \
      {name ".s64", each<F, int64_t, int64_t, int64_t>}, {name ".u64", each<F, uint64_t, uint64_t, uint64_t>}
#define BITS(name, F)                                                                                  \
  {name ".b16", each<F, uint16_t, uint16_t, uint16_t>}, {name ".b32", each<F, uint32_t, uint32_t, uint32_t>}, \
      {name ".b64", each<F, uint64_t, uint64_t, uint64_t>}
#define SHIFT(name, F, s)                                                                             \
  {name "." #s "16", each<F, s##16_, s##16_, uint32_t>}, {name "." #s "32", each<F, s##32_, s##32_, uint32_t>}, \
      {name "." #s "64", each<F, s##64_, s##64_, uint32_t>}
using s16_ = int16_t;
using s32_ = int32_t;
using s64_ = int64_t;
using u16_ = uint16_t;
using u32_ = uint32_t;
using u64_ = uint64_t;
using b16_ = uint16_t;
using b32_ = uint32_t;
using b64_ = uint64_t;

const Entry kEntries[] = {
    INTEGER("add", Add), INTEGER("sub", Sub), INTEGER("mul.lo", Mul), INTEGER("min", Min), INTEGER("max", Max),
    INTEGER("div", Div), INTEGER("rem", Rem), BITS("and", And), BITS("or", Or), BITS("xor", Xor),
    SHIFT("shl", Shl, b), SHIFT("shr", Shr, u), SHIFT("shr", Shr, s), SHIFT("shr", Shr, b),
    {"not.b16", each<Not, uint16_t, uint16_t>}, {"not.b32", each<Not, uint32_t, uint32_t>},
    {"not.b64", each<Not, uint64_t, uint64_t>}, {"neg.s16", each<Neg, int16_t, int16_t>},
    {"neg.s32", each<Neg, int32_t, int32_t>}, {"neg.s64", each<Neg, int64_t, int64_t>},
    {"abs.s16", each<Abs, int16_t, int16_t>}, {"abs.s32", each<Abs, int32_t, int32_t>},
    {"abs.s64", each<Abs, int64_t, int64_t>},
    {"mad.lo.s16", each<Mad, int16_t, int16_t, int16_t, int16_t>},
    {"mad.lo.u16", each<Mad, uint16_t, uint16_t, uint16_t, uint16_t>},
    {"mad.lo.s32", each<Mad, int32_t, int32_t, int32_t, int32_t>},
    {"mad.lo.u32", each<Mad, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"mad.lo.s64", each<Mad, int64_t, int64_t, int64_t, int64_t>},
    {"mad.lo.u64", each<Mad, uint64_t, uint64_t, uint64_t, uint64_t>},
    {"mul.hi.s16", each<MulHi, int16_t, int16_t, int16_t>}, {"mul.hi.u16", each<MulHi, uint16_t, uint16_t, uint16_t>},
    {"mul.hi.s32", each<MulHi, int32_t, int32_t, int32_t>}, {"mul.hi.u32", each<MulHi, uint32_t, uint32_t, uint32_t>},
    {"mul.hi.s64", each<MulHi, int64_t, int64_t, int64_t>}, {"mul.hi.u64", each<MulHi, uint64_t, uint64_t, uint64_t>},
    {"mul.wide.s16", each<MulWide<int32_t>, int32_t, int16_t, int16_t>},
    {"mul.wide.u16", each<MulWide<uint32_t>, uint32_t, uint16_t, uint16_t>},
    {"mul.wide.s32", each<MulWide<int64_t>, int64_t, int32_t, int32_t>},
    {"mul.wide.u32", each<MulWide<uint64_t>, uint64_t, uint32_t, uint32_t>},
    {"mad.wide.s16", each<MadWide<int32_t>, int32_t, int16_t, int16_t, int32_t>},
    {"mad.wide.u16", each<MadWide<uint32_t>, uint32_t, uint16_t, uint16_t, uint32_t>},
    {"mad.wide.s32", each<MadWide<int64_t>, int64_t, int32_t, int32_t, int64_t>},
    {"mad.wide.u32", each<MadWide<uint64_t>, uint64_t, uint32_t, uint32_t, uint64_t>},
    {"bfe.u32", each<Bfe, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"bfe.s32", each<Bfe, int32_t, int32_t, uint32_t, uint32_t>},
    {"bfe.u64", each<Bfe, uint64_t, uint64_t, uint32_t, uint32_t>},
    {"bfe.s64", each<Bfe, int64_t, int64_t, uint32_t, uint32_t>},
    {"bfi.b32", each<Bfi, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"prmt.b32", each<Prmt, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"lop3.b32", each<Lop3, uint32_t, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"shf.l.wrap.b32", each<FunnelLeft, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"shf.r.wrap.b32", each<FunnelRight, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"popc.b32", each<Popc, uint32_t, uint32_t>}, {"popc.b64", each<Popc, uint32_t, uint64_t>},
    {"clz.b32", each<Clz, uint32_t, uint32_t>}, {"clz.b64", each<Clz, uint32_t, uint64_t>},
    {"bfind.u32", each<Bfind, uint32_t, uint32_t>}, {"brev.b32", each<Brev, uint32_t, uint32_t>},
};

}  // namespace

Handler find_integer(const std::string& name) { return find_in(kEntries, name); }
