// Element conversions, exp and log as plain loops' bodies: `#pragma omp simd` vectorises them for
// whatever the function that inlines them is compiled for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

// One body, compiled for three generations of x86-64 and chosen when the library is loaded.
// Elsewhere the baseline (NEON on aarch64) is what there is.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define KDFAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define KDFAST_CLONES
#endif

#if defined(__GNUC__)
#define KDFAST_INLINE inline __attribute__((always_inline))
#else
#define KDFAST_INLINE inline
#endif

namespace kdfast {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

KDFAST_INLINE float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

KDFAST_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

KDFAST_INLINE float to_real(float x) { return x; }
KDFAST_INLINE double to_real(double x) { return x; }
KDFAST_INLINE float to_real(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

KDFAST_INLINE float to_real(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  // Rebias from 15 to 127; infinities and NaN need the bias twice.
  const uint32_t rebiased = magnitude + (exponent == 0x0f800000u ? 0x70000000u : 0x38000000u);
  // A subnormal is an integer multiple of 2^-24, which a float difference normalises.
  const float subnormal = float_from_bits(rebiased + 0x00800000u) - float_from_bits(0x38800000u);
  return float_from_bits(sign | (exponent == 0 ? bits_of(subnormal) : rebiased));
}

KDFAST_INLINE void from_real(float value, float& out) { out = value; }
KDFAST_INLINE void from_real(double value, double& out) { out = value; }

// Both roundings are to nearest even, and keep NaN quiet.
KDFAST_INLINE void from_real(float value, bfloat16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out.bits = static_cast<uint16_t>((is_nan ? bits | 0x00400000u : rounded) >> 16);
}

KDFAST_INLINE void from_real(float value, float16& out) {
  const uint32_t bits = bits_of(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the float adder round at 2^-24, the unit of float16's subnormals.
  const uint32_t subnormal = bits_of(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x47800000u ? overflow : half;
  out.bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// 2^x for x <= 0: to 1 ulp, and an exact 0 where the result would be subnormal. NaN passes.
KDFAST_INLINE float exp2_nonpositive(float x) {
  // 1.5 * 2^23: adding it rounds to an integer, which then stands in the low bits. With 127 more
  // they are the exponent of 2^n.
  constexpr float kRound = 12582912.f + 127.f;
  constexpr float kUnderflow = -126.f;

  const float rounded = x + kRound;
  const float r = x - (rounded - kRound);
  // The minimax polynomial of 2^r for |r| <= 1/2.
  float poly = 1.5353361959569156e-4f;
  poly = poly * r + 1.3398875016719103e-3f;
  poly = poly * r + 9.61843691766262e-3f;
  poly = poly * r + 5.5503323674201965e-2f;
  poly = poly * r + 2.4022647738456726e-1f;
  poly = poly * r + 6.931471824645996e-1f;
  poly = poly * r + 1.f;
  const float scaled = poly * float_from_bits(bits_of(rounded) << 23);
  return x < kUnderflow ? 0.f : scaled;
}

KDFAST_INLINE double exp2_nonpositive(double x) { return std::exp2(x); }

// log(x) for positive normal x, to 2 ulp where the caller knows x - 1 to 1 ulp: x itself cannot say
// how far from 1 it was before it was rounded.
KDFAST_INLINE float log_near_one(float x, float x_minus_one) {
  constexpr float kLn2High = 0.693359375f;
  constexpr float kLn2Low = -2.12194440e-4f;
  // The mantissa is taken in [sqrt(1/2), sqrt(2)), so that x near 1 has exponent 0.
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;

  const uint32_t shifted = bits_of(x) - kSqrtHalf;
  const int32_t exponent = static_cast<int32_t>(shifted) >> 23;
  const float mantissa = float_from_bits((shifted & 0x007fffffu) + kSqrtHalf) - 1.f;
  const float m = exponent == 0 ? x_minus_one : mantissa;
  // The minimax polynomial of (log(1 + m) - m + m^2 / 2) / m^3.
  float poly = 8.700425177812576e-2f;
  poly = poly * m - 1.4267484843730927e-1f;
  poly = poly * m + 1.4914770424365997e-1f;
  poly = poly * m - 1.657758504152298e-1f;
  poly = poly * m + 1.9963063299655914e-1f;
  poly = poly * m - 2.500133812427521e-1f;
  poly = poly * m + 3.333390951156616e-1f;
  const float square = m * m;
  const float n = static_cast<float>(exponent);
  const float tail = poly * m * square + n * kLn2Low - 0.5f * square;
  return tail + m + n * kLn2High;
}

KDFAST_INLINE double log_near_one(double x, double x_minus_one) {
  return std::abs(x_minus_one) < 0.5 ? std::log1p(x_minus_one) : std::log(x);
}

}  // namespace kdfast
