// The elementary functions of csrc/kernels: their errors, tried out.
//
//   log2_fast     every normal float up to 1, with FMA (as AVX2, AVX-512 and CUDA run it) and without
//                 (as the portable walk does), against float64: below kLog2Error 2^-24, and exact at
//                 powers of two
//   log2_exact    against the long double of the C library: 4 ulp
//   exp_exact     the same: 2 ulp
#define GENKL_SIMD_PORTABLE
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "kernels/simd.h"

namespace genkl {
namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

constexpr uint32_t kSignificands = 1u << 23;
constexpr int kLowestExponent = -126;

// logs[i] = log2 of 1 + i 2^-23.
std::vector<double> significand_logs() {
  std::vector<double> logs(kSignificands);
  for (uint32_t i = 0; i < kSignificands; ++i) logs[i] = std::log2(1.0 + i * 0x1p-23);
  return logs;
}

constexpr uint32_t kBlock = 64;

// The largest relative error, in units of 2^-24, of a logarithm of kBlock floats at a time over the
// floats 2^exponent (1 + i 2^-23). Inlined into callers that are compiled with and without FMA.
template <typename Log2Block>
[[gnu::always_inline]] inline double largest_error(int exponent, const double* logs,
                                                   Log2Block log2_block) {
  double largest = 0.0;
  for (uint32_t i = 0; i < kSignificands; i += kBlock) {
    float x[kBlock], y[kBlock];
    for (uint32_t z = 0; z < kBlock; ++z)
      x[z] = bit_cast<float>((static_cast<uint32_t>(exponent + 127) << 23) + i + z);
    log2_block(x, y);
    for (uint32_t z = 0; z < kBlock; ++z) {
      const double exact = exponent + logs[i + z];
      const double error = std::fabs((static_cast<double>(y[z]) - exact) / exact);
      largest = error > largest ? error : largest;
    }
  }
  return largest * 0x1p24;
}

struct FastBlock {
  [[gnu::always_inline]] void operator()(const float* x, float* y) const {
    for (uint32_t z = 0; z < kBlock; ++z) y[z] = log2_fast(x[z]);
  }
};

struct PortableBlock {
  void operator()(const float* x, float* y) const {
    for (uint32_t z = 0; z < kBlock; z += kWidth) store(y + z, log2(load(x + z)));
  }
};

// fmaf as one instruction where there is one; elsewhere the C library's, with the same results.
double largest_error_fast(int exponent, const double* logs) {
  return largest_error(exponent, logs, FastBlock());
}
#if defined(__x86_64__)
[[gnu::target("avx2,fma")]] double largest_error_avx2(int exponent, const double* logs) {
  return largest_error(exponent, logs, FastBlock());
}
const auto largest_error_with_fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")
                                        ? largest_error_avx2
                                        : largest_error_fast;
#else
const auto largest_error_with_fma = largest_error_fast;
#endif

double largest_error_portable(int exponent, const double* logs) {
  return largest_error(exponent, logs, PortableBlock());
}

void test_log2_fast() {
  const std::vector<double> logs = significand_logs();
  double with_fma = 0.0, portable = 0.0;
  for (int exponent = kLowestExponent; exponent < 0; ++exponent) {
    with_fma = std::max(with_fma, largest_error_with_fma(exponent, logs.data()));
    portable = std::max(portable, largest_error_portable(exponent, logs.data()));
  }
  std::printf("log2_fast: largest relative error %.3f 2^-24 with FMA, %.3f 2^-24 without\n",
              with_fma, portable);
  expect(with_fma < kLog2Error, "log2_fast with FMA is within kLog2Error");
  expect(portable < kLog2Error, "log2_fast without FMA is within kLog2Error");
  for (int exponent = kLowestExponent; exponent <= 0; ++exponent)
    expect(log2_fast(std::ldexp(1.0f, exponent)) == static_cast<float>(exponent),
           "log2_fast is exact at powers of two");
}

// How many units in the last place of `exact` the value is away from it.
double ulps(double value, long double exact) {
  const double nearest = static_cast<double>(exact);
  if (nearest == 0.0) return value == 0.0 ? 0.0 : INFINITY;
  const double ulp = std::nextafter(std::fabs(nearest), INFINITY) - std::fabs(nearest);
  return static_cast<double>(std::fabs(static_cast<long double>(value) - exact)) / ulp;
}

constexpr int kSamples = 2000000;

void test_log2_exact() {
  std::mt19937_64 random(1);
  double largest = 0.0;
  const auto try_number = [&](double x) {
    largest = std::max(largest, ulps(log2_exact(x), std::log2(static_cast<long double>(x))));
  };
  for (int i = 0; i < kSamples; ++i) {
    const double x = 1.0 - static_cast<double>(random() >> 11) * 0x1p-53;
    try_number(x);
    try_number(std::ldexp(x, -static_cast<int>(random() % 1000)));
    try_number(1.0 - std::ldexp(x, -static_cast<int>(random() % 53)));
  }
  std::printf("log2_exact: at most %.3f ulp\n", largest);
  expect(largest <= 4.0, "log2_exact is within 4 ulp");
  for (int exponent = -1022; exponent <= 1023; ++exponent)
    expect(log2_exact(std::ldexp(1.0, exponent)) == exponent,
           "log2_exact is exact at powers of two");
  expect(std::isnan(log2_exact(NAN)), "log2_exact hands NaN on");
  expect(log2_exact(INFINITY) == INFINITY, "log2_exact hands infinity on");
}

void test_exp_exact() {
  std::mt19937_64 random(2);
  double largest = 0.0;
  const auto try_number = [&](double x) {
    largest = std::max(largest, ulps(exp_exact(x), std::exp(static_cast<long double>(x))));
  };
  for (int i = 0; i < kSamples; ++i) {
    const double part = static_cast<double>(random() >> 11) * 0x1p-53;
    try_number(-700.0 * part);
    try_number(-30.0 * part);
    try_number(-std::ldexp(part, -static_cast<int>(random() % 60)));
  }
  std::printf("exp_exact: at most %.3f ulp\n", largest);
  expect(largest <= 2.0, "exp_exact is within 2 ulp");
  expect(exp_exact(0.0) == 1.0, "exp_exact(0) is 1");
  expect(exp_exact(-700.0) > 0.0, "exp_exact(-700) is above 0");
  expect(exp_exact(std::nextafter(-700.0, -701.0)) == 0.0, "exp_exact is 0 below -700");
  expect(exp_exact(-INFINITY) == 0.0, "exp_exact(-infinity) is 0");
  expect(std::isnan(exp_exact(NAN)), "exp_exact hands NaN on");
}

}  // namespace
}  // namespace genkl

int main() {
  genkl::test_log2_fast();
  genkl::test_log2_exact();
  genkl::test_exp_exact();
  return genkl::failures ? 1 : 0;
}
