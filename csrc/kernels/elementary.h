// The elementary functions of the score, for host and device: log2 in float32 (fast) and in float64
// (reproducible), exp in float64 (reproducible).
//
// The float64 functions use only operations that IEEE-754 fixes to the last bit, in the order of
// genkl_ext/reference.py. They must be compiled without contraction to FMA (-ffp-contract=off,
// -fmad=false): then the host, the device and NumPy agree in every bit.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define GENKL_HD __host__ __device__ __forceinline__
#else
#define GENKL_HD static inline
#endif

namespace genkl {

constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2High = 0.6931471803691238;      // its low 21 bits are 0
constexpr double kLn2Low = 1.9082149292705877e-10;   // ln 2 - kLn2High
constexpr double kRoundingShift = 6755399441055744;  // 1.5 * 2^52: adding it rounds to an integer
constexpr int kSumLanes = 32;                        // partial sums of a softmax denominator

template <typename To, typename From>
GENKL_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// log2(1 + r) / r on [-1/4, 1/2]: minimax polynomial, relative error 4.2e-9 before rounding.
// Coefficient n belongs to r^n. kLog2Error bounds the relative error of the float32 log2 built from
// it, in units of 2^-24, with and without FMA (tests/csrc/test_elementary.cpp).
constexpr float kLog2Coefficients[10] = {
    1.4426950216293335f,  -0.7213475108146667f,  0.48090076446533203f, -0.3606748580932617f,
    0.28838402032852173f, -0.24014833569526672f, 0.2091013640165329f,  -0.19027766585350037f,
    0.1506633311510086f,  -0.06434094160795212f};
constexpr int kLog2Error = 6;
constexpr int32_t kThreeQuarters =
    0x3f400000;  // the bits of 0.75f: mantissas are cut at [0.75, 1.5)

// log2 of a positive normal float; exact at powers of two. The polynomial is summed in halves, not
// term after term: five operations deep, not ten.
GENKL_HD float log2_fast(float x) {
  constexpr float c0 = kLog2Coefficients[0], c1 = kLog2Coefficients[1], c2 = kLog2Coefficients[2],
                  c3 = kLog2Coefficients[3], c4 = kLog2Coefficients[4], c5 = kLog2Coefficients[5],
                  c6 = kLog2Coefficients[6], c7 = kLog2Coefficients[7], c8 = kLog2Coefficients[8],
                  c9 = kLog2Coefficients[9];
  const uint32_t bits = bit_cast<uint32_t>(x);
  const int32_t exponent = static_cast<int32_t>(bits - static_cast<uint32_t>(kThreeQuarters)) >> 23;
  const float r = bit_cast<float>(bits - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  const float r2 = r * r, r4 = r2 * r2;
  const float low = fmaf(fmaf(c3, r, c2), r2, fmaf(c1, r, c0));
  const float high = fmaf(fmaf(c7, r, c6), r2, fmaf(c5, r, c4));
  const float top = fmaf(fmaf(c9, r, c8), r4, high);
  return fmaf(r, fmaf(top, r4, low), static_cast<float>(exponent));
}

// log2 of a positive normal double to 4 ulp; NaN and infinity are returned as they are.
// x = 2^e m, m in [0.75, 1.5), s = (m - 1) / (m + 1): e + 2 log2(e) (s + s^3/3 + ... + s^27/27).
GENKL_HD double log2_exact(double x) {
  constexpr int64_t three_quarters = 0x3fe8000000000000;
  const int64_t bits = bit_cast<int64_t>(x);
  const int64_t exponent = (bits - three_quarters) >> 52;
  const double r = bit_cast<double>(static_cast<int64_t>(static_cast<uint64_t>(bits) -
                                                         (static_cast<uint64_t>(exponent) << 52))) -
                   1.0;
  const double s = r / (2.0 + r);
  const double z = s * s;
  double p = 2.0 * kLog2E / 27.0;
#if defined(__CUDA_ARCH__)
#pragma unroll
#endif
  for (int n = 25; n > 0; n -= 2) p = p * z + 2.0 * kLog2E / n;
  const double value = static_cast<double>(static_cast<int32_t>(exponent)) + s * p;
  return x <= 1.7976931348623157e308 ? value : x;
}

// e^x for x <= 0 to 2 ulp; 0 below -700; NaN is returned as it is.
GENKL_HD double exp_exact(double x) {
  const double y = x < -700.0 ? -700.0 : x;
  const double shifted = y * kLog2E + kRoundingShift;
  const double n = shifted - kRoundingShift;
  const double r = (y - n * kLn2High) - n * kLn2Low;
  double p = 1.0 / 6227020800.0;  // 1/13!, then 1/12! and so on
  p = p * r + 1.0 / 479001600.0;
  p = p * r + 1.0 / 39916800.0;
  p = p * r + 1.0 / 3628800.0;
  p = p * r + 1.0 / 362880.0;
  p = p * r + 1.0 / 40320.0;
  p = p * r + 1.0 / 5040.0;
  p = p * r + 1.0 / 720.0;
  p = p * r + 1.0 / 120.0;
  p = p * r + 1.0 / 24.0;
  p = p * r + 1.0 / 6.0;
  p = p * r + 1.0 / 2.0;
  p = p * r + 1.0;
  p = p * r + 1.0;
  // The integer n stands in the low bits of `shifted`; 2^n is its exponent field.
  const int64_t power =
      static_cast<int64_t>(static_cast<uint64_t>(bit_cast<int64_t>(shifted) + 1023) << 52);
  const double value = p * bit_cast<double>(power);
  return x < -700.0 ? 0.0 : value;
}

}  // namespace genkl
