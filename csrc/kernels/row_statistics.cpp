// The CPU walk of row_statistics: four rows side by side in the lanes, four classes at a time, so that
// their logarithms need not wait for one another. Compiled once per instruction set; the compiler
// splits the lanes where a register has fewer.
#include "row_statistics.h"

#include <limits>

#include "simd.h"  // kSimdName

#define GENKL_INLINE inline __attribute__((always_inline))

namespace genkl {
namespace {

constexpr int kRows = 4;     // lanes
constexpr int kClasses = 4;  // vectors
typedef double D __attribute__((vector_size(8 * kRows)));
typedef uint64_t U __attribute__((vector_size(8 * kRows)));
typedef float Narrow __attribute__((vector_size(4 * kRows)));

constexpr double kSmallest = 2.2250738585072014e-308;  // 2^-1022, the smallest normal number
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// log2_exact of positive normal numbers.
GENKL_INLINE void log2_lanes(const D (&x)[kClasses], D (&result)[kClasses]) {
  constexpr uint64_t three_quarters = 0x3fe8000000000000, bias = 1023;
  D whole[kClasses], s[kClasses], z[kClasses], p[kClasses];
  for (int i = 0; i < kClasses; ++i) {
    const U bits = reinterpret_cast<U>(x[i]);
    const U exponent = (bits - (three_quarters - (bias << 52))) >> 52;  // + bias: never negative
    const U mantissa = bits - ((exponent - bias) << 52);
    // An integer below 2^52 stands in the low bits of itself plus 2^52.
    whole[i] = reinterpret_cast<D>(exponent | 0x4330000000000000) - (0x1p52 + 1023.0);
    const D r = reinterpret_cast<D>(mantissa) - 1.0;
    s[i] = r / (2.0 + r);
    z[i] = s[i] * s[i];
    p[i] = D{} + 2.0 * kLog2E / 27.0;
  }
#pragma GCC unroll 13
  for (int n = 25; n > 0; n -= 2)
    for (int i = 0; i < kClasses; ++i) p[i] = p[i] * z[i] + 2.0 * kLog2E / n;
  for (int i = 0; i < kClasses; ++i) result[i] = whole[i] + s[i] * p[i];
}

GENKL_INLINE void load_class(const float* const* row, int c, D& q) {
  q = __builtin_convertvector((Narrow{row[0][c], row[1][c], row[2][c], row[3][c]}), D);
}
GENKL_INLINE void load_class(const double* const* row, int c, D& q) {
  q = D{row[0][c], row[1][c], row[2][c], row[3][c]};
}

// What is gathered of kRows rows.
struct Gathered {
  D total = {}, squares = {}, entropy = {}, logs = {};
  D lowest = D{} + kInfinity, top = D{} - kInfinity, second = D{} - kInfinity, top_class = {};
};

// Classes c to c + kPresent - 1.
template <int kPresent, typename T, bool kEntropyToo, bool kLogsToo>
GENKL_INLINE void gather(const T* const* row, int c, double floor, Gathered& g) {
  const D one = D{} + 1.0, lowest = D{} + floor;
  D q[kClasses], x[kClasses], logarithms[kClasses];
  for (int i = 0; i < kClasses; ++i) q[i] = D{};
  for (int i = 0; i < kPresent; ++i) load_class(row, c + i, q[i]);
  for (int i = 0; i < kPresent; ++i) {
    const D number = D{} + static_cast<double>(c + i);
    g.total += q[i];
    g.squares += q[i] * q[i];
    g.lowest = q[i] < g.lowest ? q[i] : g.lowest;
    const D loser = q[i] > g.top ? g.top : q[i];
    g.second = loser > g.second ? loser : g.second;
    g.top_class = q[i] > g.top ? number : g.top_class;
    g.top = q[i] > g.top ? q[i] : g.top;
  }
  if (kEntropyToo) {
    for (int i = 0; i < kClasses; ++i) x[i] = q[i] >= kSmallest ? q[i] : one;
    log2_lanes(x, logarithms);
    for (int i = 0; i < kPresent; ++i) g.entropy += q[i] * logarithms[i];
  }
  if (kLogsToo) {
    for (int i = 0; i < kClasses; ++i) x[i] = q[i] > floor ? q[i] : lowest;
    log2_lanes(x, logarithms);
    for (int i = 0; i < kPresent; ++i) g.logs += logarithms[i];
  }
}

template <typename T, bool kEntropyToo, bool kLogsToo>
GENKL_INLINE void gather_all(const T* const* row, int classes, double floor, Gathered& g) {
  int c = 0;
  for (; c + kClasses <= classes; c += kClasses)
    gather<kClasses, T, kEntropyToo, kLogsToo>(row, c, floor, g);
  if (classes - c == 3) gather<3, T, kEntropyToo, kLogsToo>(row, c, floor, g);
  if (classes - c == 2) gather<2, T, kEntropyToo, kLogsToo>(row, c, floor, g);
  if (classes - c == 1) gather<1, T, kEntropyToo, kLogsToo>(row, c, floor, g);
}

template <typename T, bool kEntropyToo, bool kLogsToo>
void walk(const RowJob& job) {
  const T* const rows = static_cast<const T*>(job.rows);
  for (int64_t r = 0; r < job.count; r += kRows) {
    const int present = static_cast<int>(job.count - r < kRows ? job.count - r : kRows);
    const T* row[kRows];
    for (int i = 0; i < kRows; ++i) row[i] = rows + (r + (i < present ? i : 0)) * job.classes;
    Gathered g;
    gather_all<T, kEntropyToo, kLogsToo>(row, job.classes, job.floor, g);
    const D spoilt = g.total - g.total;  // NaN where the total is not finite
    const auto write = [&](RowStatistic which, const D& values) __attribute__((always_inline)) {
      memcpy(job.out + which * job.count + r, &values, sizeof(double) * present);
    };
    write(kTotal, g.total);
    write(kLowest, g.lowest);
    write(kSquares, g.squares + spoilt);
    write(kTop, g.top + spoilt);
    write(kSecond, g.second + spoilt);
    write(kTopClass, g.top_class + spoilt);
    if (kEntropyToo) write(kEntropy, g.entropy + spoilt);
    if (kLogsToo) write(kLogs, g.logs + spoilt);
  }
}

template <typename T>
void run_wanted(const RowJob& job) {
  if (job.entropy && job.logs) return walk<T, true, true>(job);
  if (job.entropy) return walk<T, true, false>(job);
  if (job.logs) return walk<T, false, true>(job);
  walk<T, false, false>(job);
}

void run(const RowJob& job) {
  if (job.wide) return run_wanted<double>(job);
  run_wanted<float>(job);
}

}  // namespace

#if defined(GENKL_SIMD_AVX512)
extern const RowStatisticsKernel kRowStatisticsKernelAvx512;
const RowStatisticsKernel kRowStatisticsKernelAvx512 = {kSimdName, run};
#elif defined(GENKL_SIMD_AVX2)
extern const RowStatisticsKernel kRowStatisticsKernelAvx2;
const RowStatisticsKernel kRowStatisticsKernelAvx2 = {kSimdName, run};
#else
extern const RowStatisticsKernel kRowStatisticsKernelPortable;
const RowStatisticsKernel kRowStatisticsKernelPortable = {kSimdName, run};
#endif

}  // namespace genkl
