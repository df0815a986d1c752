// The emulation itself: right kernels give right results in every order of threads, and each fault
// that it promises to notice is noticed.
#include <cstdio>

#include "cuda_emulation.h"

namespace {

using cuda_emulation::Failure;
using cuda_emulation::machine;

constexpr unsigned kAll = 0xffffffffu;
constexpr int kSeeds = 20;

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "FAILED: %s\n", what);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                   size_t shared_bytes, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
void expect_failure(const char* words, void (*kernel)(Parameters...), unsigned threads,
                    size_t shared_bytes, Arguments... arguments) {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    machine().seed(seed);
    try {
      launch(kernel, 2, threads, shared_bytes, arguments...);
      return expect(false, words);
    } catch (const Failure& failure) {
      if (std::strstr(failure.what(), words)) continue;
      std::fprintf(stderr, "noticed as: %s\n", failure.what());
      return expect(false, words);
    }
  }
}

// Whether the kernel's result is `wanted` for every seed.
bool always_gives(int wanted, void (*kernel)(int*), unsigned threads) {
  int right = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    machine().seed(seed);
    int result = 0;
    launch(kernel, 1, threads, threads * sizeof(int), &result);
    right += result == wanted;
  }
  return right == kSeeds;
}

int* shared_ints() { return reinterpret_cast<int*>(shared_memory); }

// ---- barriers

template <bool kBarrier>
__global__ void block_count(int* result) {
  int* parts = shared_ints();
  parts[threadIdx.x] = 7;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0)
    for (unsigned i = 0; i < blockDim.x; ++i) *result += parts[i] == 7;
}

template <bool kBarrier>
__global__ void warp_neighbour(int* result) {
  int* parts = shared_ints();
  parts[threadIdx.x] = 7;
  if (kBarrier) __syncwarp();
  if (parts[(threadIdx.x + 1) % 32] == 7 && threadIdx.x == 5) *result = 1;
}

void test_barriers() {
  expect(always_gives(96, block_count<true>, 96), "a count with a barrier");
  expect(!always_gives(96, block_count<false>, 96), "a missing __syncthreads");
  expect(always_gives(1, warp_neighbour<true>, 32), "a neighbour with a barrier");
  expect(!always_gives(1, warp_neighbour<false>, 32), "a missing __syncwarp");
}

// ---- exchange of values

__global__ void exchange(int* wrong) {
  const int lane = static_cast<int>(threadIdx.x % 32), value = 100 + lane;
  *wrong += __shfl_sync(kAll, value, 3) != 103;
  *wrong += __shfl_xor_sync(kAll, value, 16) != 100 + (lane ^ 16);
  *wrong += __shfl_up_sync(kAll, value, 2) != (lane < 2 ? value : value - 2);
  *wrong += __shfl_down_sync(kAll, value, 5) != (lane + 5 > 31 ? value : value + 5);
  *wrong += __shfl_sync(kAll, 0.5 + lane, 31) != 31.5;
  *wrong += __ballot_sync(kAll, lane % 3 == 0) != 0x49249249u;
  *wrong += __any_sync(kAll, lane == 9) != 1 || __any_sync(kAll, false) != 0;
  *wrong += __all_sync(kAll, true) != 1 || __all_sync(kAll, lane != 9) != 0;
  *wrong += __reduce_add_sync(kAll, lane) != 496;
  *wrong += __reduce_max_sync(kAll, static_cast<unsigned>(lane * 7 % 32)) != 31;
  if (lane < 8) *wrong += __shfl_sync(0xffu, value, 7) != 107;
}

void test_exchange() {
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    machine().seed(seed);
    int wrong = 0;
    launch(exchange, 2, 64, 0, &wrong);
    expect(wrong == 0, "shuffles, votes and reductions");
  }
}

// ---- faults

__global__ void different_meetings(int*) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __ballot_sync(kAll, true);
}

__global__ void different_masks(int*) {
  if (threadIdx.x < 16)
    __any_sync(kAll, true);
  else
    __any_sync(0xffff0000u, true);
}

__global__ void deserted(int*) {
  if (threadIdx.x == 31) return;
  __syncwarp();
}

__global__ void deserted_barrier(int*) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
}

__global__ void outside_own_mask(int*) { __shfl_sync(0xffffu, 1, 0); }

__global__ void from_outside_mask(int*) {
  if (threadIdx.x < 16) __shfl_sync(0xffffu, 1, 20);
}

#if !defined(__SANITIZE_ADDRESS__)  // which would stop the program
__global__ void past_shared(int*) {
  if (threadIdx.x == 0) shared_memory[4].x = 1;
}
#endif

__global__ void unaligned(const float* p) { __ldg(reinterpret_cast<const float4*>(p + 1)); }

__global__ void nothing(int*) {}

void test_faults() {
  int* none = nullptr;
  alignas(16) const float floats[8] = {};
  expect_failure("meet in different places", different_meetings, 32, 0, none);
  expect_failure("meet in different places", different_masks, 32, 0, none);
  expect_failure("waits for a lane that has left", deserted, 32, 0, none);
  expect_failure("waits for threads that have left", deserted_barrier, 64, 0, none);
  expect_failure("a lane is not in its own mask", outside_own_mask, 32, 0, none);
  expect_failure("a lane outside its mask", from_outside_mask, 32, 0, none);
  expect_failure("a lane that the block does not have", different_meetings, 24, 0, none);
#if !defined(__SANITIZE_ADDRESS__)
  expect_failure("past the dynamic shared memory", past_shared, 32, 64, none);
#endif
  expect_failure("not aligned", unaligned, 32, 0, static_cast<const float*>(floats));
  expect(launch(nothing, 1, 2048, 0, none) != cudaSuccess, "too many threads");
  expect(launch(nothing, 0, 32, 0, none) != cudaSuccess, "an empty grid");
  expect(launch(nothing, 1, 32, kSharedBytes + 1, none) != cudaSuccess, "too much shared memory");
  expect(launch(nothing, 1, 32, 0, none) == cudaSuccess, "a launch after failures");
}

// ---- numbers

void test_numbers() {
  expect(__half2float({0x3c00}) == 1.0f && __half2float({0xc000}) == -2.0f, "float16 numbers");
  expect(__half2float({0x0001}) == 0x1p-24f && __half2float({0x0400}) == 0x1p-14f, "small float16");
  expect(__half2float({0x7bff}) == 65504.0f && std::isinf(__half2float({0xfc00})) &&
             std::isnan(__half2float({0x7e00})),
         "large float16");
  expect(__bfloat162float({0x3f80}) == 1.0f && __bfloat162float({0xc040}) == -3.0f, "bfloat16");
  double largest = 0.0;
  for (float x = 0x1p-100f; x < 0.5f; x *= 1.001f) {
    const double exact = std::log2(static_cast<double>(x));
    largest = std::fmax(largest, std::fabs((emulated_log2_approx(x) - exact) / exact));
  }
  expect(largest > 0x1p-23 && largest <= 0x1p-22, "the error of the approximate logarithm");
}

}  // namespace

int main() {
  test_barriers();
  test_exchange();
  test_faults();
  test_numbers();
  std::printf("%d failures\n", failures);
  return failures ? 1 : 0;
}
