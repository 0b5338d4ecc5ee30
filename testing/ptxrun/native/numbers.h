// How floats of 16 and 8 bits are decoded, and rounded: to the nearest even, or truncated.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

inline float float_of(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline uint32_t bits_of(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}

// Rounds to `mantissa` bits, and to the spacing of subnormals below 2^lowest. Exact: doubles hold every step.
inline double round_to(double x, int mantissa, int lowest) {
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  std::frexp(x, &exponent);
  const int unit = (exponent - 1 < lowest ? lowest : exponent - 1) - mantissa;
  return std::ldexp(std::nearbyint(std::ldexp(x, -unit)), unit);
}

struct Bf16 {
  static float unpack(uint16_t bits) { return float_of(uint32_t(bits) << 16); }
  static uint16_t pack(float x) {
    if (x != x) return 0x7FFF;
    const uint32_t bits = bits_of(x);
    return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
  static uint16_t truncate(float x) { return x != x ? 0x7FFF : uint16_t(bits_of(x) >> 16); }
  static uint16_t pack(double x) {
    const double r = round_to(x, 7, -126);
    if (x != x) return 0x7FFF;
    return uint16_t(bits_of(float(std::fabs(r) > 3.3895313892515355e38 ? std::copysign(INFINITY, r) : r)) >> 16);
  }
};

struct Fp16 {
  static float unpack(uint16_t bits) { return _cvtsh_ss(bits); }
  static uint16_t pack(float x) { return x != x ? 0x7FFF : _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
  static uint16_t truncate(float x) { return x != x ? 0x7FFF : _cvtss_sh(x, _MM_FROUND_TO_ZERO); }
  static uint16_t pack(double x) { return pack(float(round_to(x, 10, -14))); }
};

// 4 exponent bits of bias 7, 3 mantissa bits; 0x7F is NaN, and there are no infinities.
struct E4m3 {
  static float unpack(uint8_t bits) {
    const int exponent = bits >> 3 & 15, mantissa = bits & 7;
    const float sign = bits & 0x80 ? -1.0f : 1.0f;
    if (exponent == 15 && mantissa == 7) return NAN;
    if (exponent == 0) return sign * std::ldexp(float(mantissa), -9);
    return sign * std::ldexp(float(8 + mantissa), exponent - 10);
  }
  static uint8_t pack_saturated(float x) {
    if (x != x) return 0x7F;
    const uint8_t sign = std::signbit(x) ? 0x80 : 0;
    double a = std::fabs(double(x));
    if (a > 448) a = 448;
    const double r = round_to(a, 3, -6);
    if (r >= 448) return sign | 0x7E;
    if (r < 0x1p-6) return sign | uint8_t(r * 512);
    int exponent;
    const double fraction = std::frexp(r, &exponent);  // r = fraction * 2^exponent, fraction in [0.5, 1)
    return sign | uint8_t((exponent - 1 + 7) << 3 | (int(fraction * 16) - 8));
  }
};

inline uint32_t movemask(const uint8_t* bytes) {
  return uint32_t(_mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes))));
}
