// cvt. The registers of integers may be wider than their types.
#include <cfenv>
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"
#include "numbers.h"

namespace {

// An instruction's `modifier`.
enum Rounding : uint8_t { kNearest, kZero, kDown, kUp, kSaturate = 16, kFlush = 32 };

template <class D>
void write(Warp& w, const Instruction& in, const D* result, Mask active) {
  uint8_t* to = w.registers + in.operand[0];
  const int width = in.width[0];
  for (Mask left = active; left; left &= left - 1) {
    const int i = __builtin_ctz(left);
    const int64_t value = std::is_signed_v<D> ? int64_t(result[i]) : int64_t(uint64_t(result[i]));
    std::memcpy(to + i * width, &value, width);
  }
}

template <class S>
void read(Warp& w, const Instruction& in, S* values) {
  const uint8_t* from = w.registers + in.operand[1];
  const int width = in.width[1];
  for (int i = 0; i < kLanes; ++i) std::memcpy(values + i, from + i * width, sizeof(S));
}

template <class D, class S>
void integer(Warp& w, const Instruction& in, Mask active) {
  if (in.width[0] == sizeof(D) && in.width[1] == sizeof(S) && !(in.modifier & kSaturate)) {
    const S* from = operand<S>(w, in, 1);
    D result[kLanes];
    for (int i = 0; i < kLanes; ++i) result[i] = D(from[i]);
    commit(operand<D>(w, in, 0), result, active);
    return;
  }
  S from[kLanes];
  D result[kLanes];
  read(w, in, from);
  for (int i = 0; i < kLanes; ++i) {
    __int128 value = from[i];
    if (in.modifier & kSaturate) {
      const __int128 low = std::numeric_limits<D>::min(), high = std::numeric_limits<D>::max();
      value = value < low ? low : value > high ? high : value;
    }
    result[i] = D(value);
  }
  write(w, in, result, active);
}

inline double rounded(double x, uint8_t modifier) {
  switch (modifier & 3) {
    case kZero: return std::trunc(x);
    case kDown: return std::floor(x);
    case kUp: return std::ceil(x);
  }
  return std::nearbyint(x);
}

template <class D, class S>
void integer_of_float(Warp& w, const Instruction& in, Mask active) {
  const S* from = operand<S>(w, in, 1);
  D result[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const double x = rounded(from[i], in.modifier);
    const double low = double(std::numeric_limits<D>::min()), high = double(std::numeric_limits<D>::max());
    // Values out of range saturate; NaN becomes zero, or the lowest integer of 64 bits.
    result[i] = x != x       ? (sizeof(D) == 8 ? D(uint64_t(1) << 63) : D(0))
                : x <= low   ? std::numeric_limits<D>::min()
                : x >= high  ? std::numeric_limits<D>::max()
                             : D(x);
  }
  write(w, in, result, active);
}

template <class D, class S>
void float_of_integer(Warp& w, const Instruction& in, Mask active) {
  S from[kLanes];
  read(w, in, from);
  D result[kLanes];
  if ((in.modifier & 3) == kZero) std::fesetround(FE_TOWARDZERO);
  for (int i = 0; i < kLanes; ++i) {
    volatile S value = from[i];
    result[i] = D(value);
  }
  std::fesetround(FE_TONEAREST);
  commit(operand<D>(w, in, 0), result, active);
}

// Between f32 and f64; `vector`: 1 where the value is rounded to an integer.
template <class D, class S>
void floating(Warp& w, const Instruction& in, Mask active) {
  const S* from = operand<S>(w, in, 1);
  D result[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    S x = from[i];
    if (in.vector) x = S(rounded(x, in.modifier));
    D y = D(x);
    if (in.modifier & kSaturate) y = y != y ? D(0) : y < 0 ? D(0) : y > 1 ? D(1) : y;
    if ((in.modifier & kFlush) && std::fabs(y) < 0x1p-126) y = std::copysign(D(0), y);
    result[i] = y;
  }
  commit(operand<D>(w, in, 0), result, active);
}

template <class Format>
void widen(Warp& w, const Instruction& in, Mask active) {
  const uint16_t* from = operand<uint16_t>(w, in, 1);
  float result[kLanes];
  for (int i = 0; i < kLanes; ++i) result[i] = Format::unpack(from[i]);
  commit(operand<float>(w, in, 0), result, active);
}
template <class Format>
void narrow(Warp& w, const Instruction& in, Mask active) {
  const float* from = operand<float>(w, in, 1);
  uint16_t result[kLanes];
  const bool truncated = (in.modifier & 3) == kZero;
  for (int i = 0; i < kLanes; ++i) result[i] = truncated ? Format::truncate(from[i]) : Format::pack(from[i]);
  commit(operand<uint16_t>(w, in, 0), result, active);
}
template <class Format>
void narrow2(Warp& w, const Instruction& in, Mask active) {
  const float *high = operand<float>(w, in, 1), *low = operand<float>(w, in, 2);
  uint32_t result[kLanes];
  for (int i = 0; i < kLanes; ++i) result[i] = uint32_t(Format::pack(high[i])) << 16 | Format::pack(low[i]);
  commit(operand<uint32_t>(w, in, 0), result, active);
}
void e4m3_of_floats(Warp& w, const Instruction& in, Mask active) {
  const float *high = operand<float>(w, in, 1), *low = operand<float>(w, in, 2);
  uint16_t result[kLanes];
  for (int i = 0; i < kLanes; ++i)
    result[i] = uint16_t(E4m3::pack_saturated(high[i]) << 8 | E4m3::pack_saturated(low[i]));
  commit(operand<uint16_t>(w, in, 0), result, active);
}
void halves_of_e4m3(Warp& w, const Instruction& in, Mask active) {
  const uint16_t* from = operand<uint16_t>(w, in, 1);
  uint32_t result[kLanes];
  for (int i = 0; i < kLanes; ++i)
    result[i] = uint32_t(Fp16::pack(E4m3::unpack(uint8_t(from[i] >> 8)))) << 16 |
                Fp16::pack(E4m3::unpack(uint8_t(from[i])));
  commit(operand<uint32_t>(w, in, 0), result, active);
}
void e4m3_of_halves(Warp& w, const Instruction& in, Mask active) {
  const uint32_t* from = operand<uint32_t>(w, in, 1);
  uint16_t result[kLanes];
  for (int i = 0; i < kLanes; ++i)
    result[i] = uint16_t(E4m3::pack_saturated(Fp16::unpack(uint16_t(from[i] >> 16))) << 8 |
                         E4m3::pack_saturated(Fp16::unpack(uint16_t(from[i]))));
  commit(operand<uint16_t>(w, in, 0), result, active);
}
void tf32(Warp& w, const Instruction& in, Mask active) {  // to nearest, ties away from zero
  const uint32_t* from = operand<uint32_t>(w, in, 1);
  uint32_t result[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    const bool finite = (from[i] & 0x7F800000u) != 0x7F800000u;
    result[i] = finite ? (from[i] + 0x1000u) & 0xFFFFE000u : from[i];
  }
  commit(operand<uint32_t>(w, in, 0), result, active);
}

#define ROW(d, D)                                                                                       \
  {"cvt." d ".s8", integer<D, int8_t>}, {"cvt." d ".u8", integer<D, uint8_t>},                          \
      {"cvt." d ".s16", integer<D, int16_t>}, {"cvt." d ".u16", integer<D, uint16_t>},                  \
      {"cvt." d ".s32", integer<D, int32_t>}, {"cvt." d ".u32", integer<D, uint32_t>},                  \
      {"cvt." d ".s64", integer<D, int64_t>}, {"cvt." d ".u64", integer<D, uint64_t>},                  \
      {"cvt." d ".f32", integer_of_float<D, float>}, {"cvt." d ".f64", integer_of_float<D, double>}
#define FLOAT_ROW(d, D)                                                                                 \
  {"cvt." d ".s8", float_of_integer<D, int8_t>}, {"cvt." d ".u8", float_of_integer<D, uint8_t>},         \
      {"cvt." d ".s16", float_of_integer<D, int16_t>}, {"cvt." d ".u16", float_of_integer<D, uint16_t>}, \
      {"cvt." d ".s32", float_of_integer<D, int32_t>}, {"cvt." d ".u32", float_of_integer<D, uint32_t>}, \
      {"cvt." d ".s64", float_of_integer<D, int64_t>}, {"cvt." d ".u64", float_of_integer<D, uint64_t>}, \
      {"cvt." d ".f32", floating<D, float>}, {"cvt." d ".f64", floating<D, double>}

const Entry kEntries[] = {
    ROW("s8", int8_t), ROW("u8", uint8_t), ROW("s16", int16_t), ROW("u16", uint16_t), ROW("s32", int32_t),
    ROW("u32", uint32_t), ROW("s64", int64_t), ROW("u64", uint64_t), FLOAT_ROW("f32", float), FLOAT_ROW("f64", double),
    {"cvt.f32.bf16", widen<Bf16>}, {"cvt.f32.f16", widen<Fp16>}, {"cvt.bf16.f32", narrow<Bf16>},
    {"cvt.f16.f32", narrow<Fp16>}, {"cvt.bf16x2.f32", narrow2<Bf16>}, {"cvt.f16x2.f32", narrow2<Fp16>},
    {"cvt.e4m3x2.f32", e4m3_of_floats}, {"cvt.f16x2.e4m3x2", halves_of_e4m3}, {"cvt.e4m3x2.f16x2", e4m3_of_halves},
    {"cvt.tf32.f32", tf32},
};

}  // namespace

Handler find_conversion(const std::string& name) { return find_in(kEntries, name); }
