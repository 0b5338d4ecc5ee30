// Floating-point arithmetic. Approximate functions are correctly rounded here, to which a GPU is close.
#include <cfenv>
#include <cmath>
#include <limits>

#include "lanewise.h"
#include "numbers.h"

namespace {

template <class T>
T canonical_nan() {
  if constexpr (sizeof(T) == 4) return float_of(0x7FFFFFFFu);
  return std::numeric_limits<T>::quiet_NaN();
}
LANE_OP(FAdd, T, (T a, T b) { return a + b; })
LANE_OP(FSub, T, (T a, T b) { return a - b; })
LANE_OP(FMul, T, (T a, T b) { return a * b; })
LANE_OP(FDiv, T, (T a, T b) { return a / b; })
LANE_OP(FMin, T, (T a, T b) { return a != a ? b : b != b ? a : a < b || (a == b && std::signbit(a)) ? a : b; })
LANE_OP(FMax, T, (T a, T b) { return a != a ? b : b != b ? a : a > b || (a == b && !std::signbit(a)) ? a : b; })
LANE_OP(FMinNan, T, (T a, T b) { return a != a || b != b ? canonical_nan<T>() : FMin::of(a, b); })
LANE_OP(FMaxNan, T, (T a, T b) { return a != a || b != b ? canonical_nan<T>() : FMax::of(a, b); })
struct FMinNanXorsignAbs {
  static float of(float a, float b) {
    const float m = FMinNan::of(std::fabs(a), std::fabs(b));
    return float_of(bits_of(m) | ((bits_of(a) ^ bits_of(b)) & 0x80000000u));
  }
};
LANE_OP(FNeg, T, (T a) { return -a; })
LANE_OP(FAbs, T, (T a) { return std::fabs(a); })
LANE_OP(FSqrt, T, (T a) { return std::sqrt(a); })
LANE_OP(FRcp, T, (T a) { return T(1) / a; })
struct FFma {
  static float of(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
  static double of(double a, double b, double c) { return __builtin_fma(a, b, c); }
};
inline float flush(float a) { return std::fabs(a) < 0x1p-126f ? std::copysign(0.0f, a) : a; }
template <class F>
struct Ftz {  // subnormal operands and results are zero
  template <class... A>
  static float of(A... a) { return flush(F::of(flush(a)...)); }
};
struct DivApprox {  // the hardware takes the quotient by a divisor above 2^126 for zero
  static float of(float a, float b) {
    const float size = std::fabs(b);
    if (size > 0x1p126f && size < std::numeric_limits<float>::infinity())
      return std::isinf(a) ? canonical_nan<float>() : std::copysign(0.0f, std::signbit(a) != std::signbit(b) ? -1.f : 1.f);
    return a / b;
  }
};
struct Ex2 {
  static float of(float a) { return float(std::exp2(double(a))); }
};
struct Lg2 {
  static float of(float a) { return float(std::log2(double(a))); }
};
struct Rsqrt {
  static float of(float a) { return float(1.0 / std::sqrt(double(a))); }
};
struct Sin {
  static float of(float a) { return float(std::sin(double(a))); }
};
struct Cos {
  static float of(float a) { return float(std::cos(double(a))); }
};
struct Tanh {
  static float of(float a) { return float(std::tanh(double(a))); }
};

__attribute__((noinline, optimize("rounding-math"))) void fma_down(Warp& w, const Instruction& in, Mask active) {
  const float *a = operand<float>(w, in, 1), *b = operand<float>(w, in, 2), *c = operand<float>(w, in, 3);
  float result[kLanes];
  std::fesetround(FE_DOWNWARD);
  for (int i = 0; i < kLanes; ++i) {
    volatile float x = a[i];
    result[i] = __builtin_fmaf(x, b[i], c[i]);
  }
  std::fesetround(FE_TONEAREST);
  commit(operand<float>(w, in, 0), result, active);
}

// Two 16-bit floats in a register, computed in double so that the result is rounded once.
template <class Format, class F>
struct Packed {
  template <class... A>
  static uint32_t of(A... a) {
    const uint32_t low = Format::pack(F::of(double(Format::unpack(uint16_t(a)))...));
    const uint32_t high = Format::pack(F::of(double(Format::unpack(uint16_t(a >> 16)))...));
    return low | high << 16;
  }
};
template <class Format, class F>
struct Single16 {
  template <class... A>
  static uint16_t of(A... a) { return Format::pack(F::of(double(Format::unpack(a))...)); }
};
struct DMul {
  static double of(double a, double b) { return a * b; }
};

#define FLOAT2(name, F) \
  {name ".f32", each<F, float, float, float>}, {name ".ftz.f32", each<Ftz<F>, float, float, float>}, \
      {name ".f64", each<F, double, double, double>}
#define FLOAT1(name, F) {name ".f32", each<F, float, float>}, {name ".ftz.f32", each<Ftz<F>, float, float>}

const Entry kEntries[] = {
    FLOAT2("add", FAdd), FLOAT2("add.rn", FAdd), FLOAT2("sub", FSub), FLOAT2("sub.rn", FSub), FLOAT2("mul", FMul),
    FLOAT2("mul.rn", FMul), FLOAT2("min", FMin), FLOAT2("max", FMax), FLOAT2("div.rn", FDiv),
    {"min.NaN.f32", each<FMinNan, float, float, float>}, {"max.NaN.f32", each<FMaxNan, float, float, float>},
    {"min.NaN.xorsign.abs.f32", each<FMinNanXorsignAbs, float, float, float>},
    {"div.full.f32", each<FDiv, float, float, float>}, {"div.full.ftz.f32", each<Ftz<FDiv>, float, float, float>},
    {"div.approx.f32", each<DivApprox, float, float, float>},
    {"div.approx.ftz.f32", each<Ftz<DivApprox>, float, float, float>},
    FLOAT1("neg", FNeg), FLOAT1("abs", FAbs), FLOAT1("sqrt.rn", FSqrt), FLOAT1("sqrt.approx", FSqrt),
    FLOAT1("rcp.rn", FRcp), FLOAT1("rcp.approx", FRcp), FLOAT1("rsqrt.approx", Rsqrt), FLOAT1("ex2.approx", Ex2),
    FLOAT1("lg2.approx", Lg2), FLOAT1("sin.approx", Sin), FLOAT1("cos.approx", Cos), FLOAT1("tanh.approx", Tanh),
    {"neg.f64", each<FNeg, double, double>}, {"abs.f64", each<FAbs, double, double>},
    {"fma.rn.f32", each<FFma, float, float, float, float>},
    {"fma.rn.ftz.f32", each<Ftz<FFma>, float, float, float, float>},
    {"fma.rn.f64", each<FFma, double, double, double, double>}, {"fma.rm.f32", fma_down},
    {"fma.rn.bf16x2", each<Packed<Bf16, FFma>, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"fma.rn.f16x2", each<Packed<Fp16, FFma>, uint32_t, uint32_t, uint32_t, uint32_t>},
    {"mul.bf16x2", each<Packed<Bf16, DMul>, uint32_t, uint32_t, uint32_t>},
    {"mul.f16x2", each<Packed<Fp16, DMul>, uint32_t, uint32_t, uint32_t>},
    {"mul.rn.bf16x2", each<Packed<Bf16, DMul>, uint32_t, uint32_t, uint32_t>},
    {"add.f16x2", each<Packed<Fp16, FAdd>, uint32_t, uint32_t, uint32_t>},
    {"add.bf16x2", each<Packed<Bf16, FAdd>, uint32_t, uint32_t, uint32_t>},
    {"sub.f16x2", each<Packed<Fp16, FSub>, uint32_t, uint32_t, uint32_t>},
    {"sub.bf16x2", each<Packed<Bf16, FSub>, uint32_t, uint32_t, uint32_t>},
    {"fma.rn.bf16", each<Single16<Bf16, FFma>, uint16_t, uint16_t, uint16_t, uint16_t>},
    {"fma.rn.f16", each<Single16<Fp16, FFma>, uint16_t, uint16_t, uint16_t, uint16_t>},
    {"mul.bf16", each<Single16<Bf16, DMul>, uint16_t, uint16_t, uint16_t>},
    {"mul.f16", each<Single16<Fp16, DMul>, uint16_t, uint16_t, uint16_t>},
    {"add.f16", each<Single16<Fp16, FAdd>, uint16_t, uint16_t, uint16_t>},
    {"add.bf16", each<Single16<Bf16, FAdd>, uint16_t, uint16_t, uint16_t>},
    {"sub.f16", each<Single16<Fp16, FSub>, uint16_t, uint16_t, uint16_t>},
    {"sub.bf16", each<Single16<Bf16, FSub>, uint16_t, uint16_t, uint16_t>},
};

}  // namespace

Handler find_floating(const std::string& name) { return find_in(kEntries, name); }
