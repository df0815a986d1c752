// What the lanes of a warp do together. Each function here is a meeting: all 32 lanes must call it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "elementary.h"

namespace genkl {

constexpr int kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_number() { return static_cast<int>(threadIdx.x) % kLanes; }

// Folds one value per lane, pairs 16 lanes apart first, then 8, 4, 2 and 1; every lane receives the
// result. fold(a, b) must equal fold(b, a).
template <typename T, typename Fold>
__device__ __forceinline__ T warp_fold(T value, Fold fold) {
#pragma unroll
  for (int apart = kLanes / 2; apart > 0; apart /= 2)
    value = fold(value, __shfl_xor_sync(kAllLanes, value, apart));
  return value;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
  return warp_fold(value, [](T a, T b) { return a + b; });
}

// Integers have instructions of their own from compute capability 8.0 on.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
__device__ __forceinline__ int warp_sum(int value) {
  return warp_fold(value, [](int a, int b) { return a + b; });
}
__device__ __forceinline__ unsigned warp_max(unsigned value) {
  return warp_fold(value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
#else
__device__ __forceinline__ int warp_sum(int value) { return __reduce_add_sync(kAllLanes, value); }
__device__ __forceinline__ unsigned warp_max(unsigned value) {
  return __reduce_max_sync(kAllLanes, value);
}
#endif

// The number of the same order as an unsigned integer, and back; NaN has none.
__device__ __forceinline__ unsigned ordered(float x) {
  const unsigned bits = bit_cast<unsigned>(x);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float unordered(unsigned n) {
  return bit_cast<float>(n & 0x80000000u ? n & 0x7fffffffu : ~n);
}

__device__ __forceinline__ float warp_max(float value) {
  return unordered(warp_max(ordered(value)));
}
__device__ __forceinline__ float warp_min(float value) { return -warp_max(-value); }

// The sum of the values of all lanes before this one; `total` receives the sum over all lanes.
__device__ __forceinline__ int warp_sum_before(int value, int& total) {
  int sum = value;
#pragma unroll
  for (int apart = 1; apart < kLanes; apart *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, apart);
    if (lane_number() >= apart) sum += other;
  }
  total = __shfl_sync(kAllLanes, sum, kLanes - 1);
  return sum - value;
}

}  // namespace genkl
