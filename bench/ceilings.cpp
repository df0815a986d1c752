// What a processor can reach when it does nothing else: reading memory, multiply-adding.
#include <cstdint>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
constexpr int kWidth = kBytes / 4;
constexpr int kLoads = 8;          // sums in flight while reading
constexpr int kAccumulators = 12;  // cover the latency of two multiply-adds a cycle

typedef float Lanes __attribute__((vector_size(kBytes), aligned(4), may_alias));

template <typename Work>
void on_threads(int threads, Work work) {
  std::vector<std::thread> others;
  for (int t = 1; t < threads; ++t) others.emplace_back(work, t);
  work(0);
  for (std::thread& other : others) other.join();
}

float sum(const float* data, int64_t count) {
  Lanes sums[kLoads] = {};
  int64_t i = 0;
  for (; i + kLoads * kWidth <= count; i += kLoads * kWidth)
    for (int j = 0; j < kLoads; ++j)
      sums[j] += *reinterpret_cast<const Lanes*>(data + i + j * kWidth);
  float total = 0.0f;
  for (; i < count; ++i) total += data[i];
  for (int j = 0; j < kLoads; ++j)
    for (int lane = 0; lane < kWidth; ++lane) total += sums[j][lane];
  return total;
}

}  // namespace

// Sums `arrays` arrays of `count` floats each; every thread reads its own part of each.
extern "C" float read_floats(const float* const* data, int arrays, int64_t count, int threads) {
  std::vector<float> totals(static_cast<size_t>(threads));
  on_threads(threads, [&](int t) {
    const int64_t begin = count * t / threads, end = count * (t + 1) / threads;
    float total = 0.0f;
    for (int a = 0; a < arrays; ++a) total += sum(data[a] + begin, end - begin);
    totals[static_cast<size_t>(t)] = total;
  });
  float total = 0.0f;
  for (float t : totals) total += t;
  return total;
}

// Float32 multiply-adds of one round on one thread.
extern "C" int fmas_per_round() { return kAccumulators * kWidth; }

// `rounds` rounds on every thread, x = x scale + shift. Returns a number that depends on them all.
extern "C" float multiply_add(int64_t rounds, int threads, float scale, float shift) {
  std::vector<float> totals(static_cast<size_t>(threads));
  on_threads(threads, [&](int t) {
    const Lanes a = Lanes{} + scale, b = Lanes{} + shift;
    Lanes x[kAccumulators];
    for (int j = 0; j < kAccumulators; ++j) x[j] = Lanes{} + static_cast<float>(j);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
      for (int j = 0; j < kAccumulators; ++j) x[j] = x[j] * a + b;
    }
    float total = 0.0f;
    for (int j = 0; j < kAccumulators; ++j) total += x[j][0];
    totals[static_cast<size_t>(t)] = total;
  });
  float total = 0.0f;
  for (float t : totals) total += t;
  return total;
}
