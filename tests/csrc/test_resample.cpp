// resample and rotate on random cases, for the sanitizers: every array is a block of its own, exactly
// as long as it must be. Every kernel that runs here must write the same, and what the definition
// says, which is computed here for the whole image with one loop per pixel and pass. (That PyTorch
// follows the same definition is the concern of tests/test_resample.py.)
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "kernels/nc_score.h"
#include "kernels/resample.h"
#include "kernels/rotate.h"

namespace genkl {

extern const ResampleKernel kResampleKernelPortable;
#if defined(__x86_64__)
extern const ResampleKernel kResampleKernelAvx512, kResampleKernelAvx2;
#endif
// resample_kernel asks for it; the kernels are chosen here instead.
const NcKernel* nc_kernel(const char*) { return nullptr; }

namespace {

std::mt19937 random_bits(1);

int64_t between(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}

int64_t side() { return between(1, between(0, 1) ? 8 : between(0, 9) ? 90 : 900); }

std::vector<const ResampleKernel*> kernels_here() {
  std::vector<const ResampleKernel*> kernels = {&kResampleKernelPortable};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c"))
    kernels.push_back(&kResampleKernelAvx2);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    kernels.push_back(&kResampleKernelAvx512);
#endif
  return kernels;
}

// One dimension of the definition: means of `full` strided bytes.
std::vector<uint8_t> resized(const uint8_t* pixels, int64_t full, int64_t step, int64_t count) {
  const double scale = static_cast<double>(full) / static_cast<double>(count);
  const double half = scale > 1.0 ? scale : 1.0, inverse = scale > 1.0 ? 1.0 / scale : 1.0;
  std::vector<std::vector<double>> weights;
  double largest = 0.0;
  for (int64_t i = 0; i < count; ++i) {
    const double centre = scale * (static_cast<double>(i) + 0.5);
    std::vector<double> w(static_cast<size_t>(full));
    double sum = 0.0;
    for (int64_t j = 0; j < full; ++j) {
      const double height = 1.0 - std::fabs((static_cast<double>(j) - centre + 0.5) * inverse);
      // Beyond the triangle's own pixels rounding may leave a height of an ulp.
      const bool near = static_cast<double>(j) >= std::trunc(centre - half + 0.5) &&
                        static_cast<double>(j) < std::trunc(centre + half + 0.5);
      if (height > 0.0 && near) sum += w[static_cast<size_t>(j)] = height;
    }
    for (double& x : w) largest = std::fmax(largest, x /= sum);
    weights.push_back(w);
  }
  int precision = 0;
  while (precision < 22 && std::floor(0.5 + std::ldexp(largest, precision + 1)) < 32768)
    ++precision;
  std::vector<uint8_t> means;
  for (const std::vector<double>& w : weights) {
    int64_t sum = int64_t{1} << (precision - 1);
    for (int64_t j = 0; j < full; ++j)
      sum += static_cast<int64_t>(0.5 + std::ldexp(w[static_cast<size_t>(j)], precision)) *
             pixels[j * step];
    const int64_t mean = sum >> precision;
    means.push_back(static_cast<uint8_t>(mean > 255 ? 255 : mean));
  }
  return means;
}

// The whole image resized: [rows, columns, 3].
std::vector<uint8_t> definition(const std::vector<uint8_t>& image, int64_t height, int64_t width,
                                int64_t rows, int64_t columns) {
  std::vector<uint8_t> wide(static_cast<size_t>(height * columns * 3));
  for (int64_t y = 0; y < height; ++y)
    for (int64_t c = 0; c < 3; ++c) {
      const std::vector<uint8_t> line = resized(&image[(y * width) * 3 + c], width, 3, columns);
      for (int64_t x = 0; x < columns; ++x) wide[(y * columns + x) * 3 + c] = line[x];
    }
  std::vector<uint8_t> result(static_cast<size_t>(rows * columns * 3));
  for (int64_t x = 0; x < columns * 3; ++x) {
    const std::vector<uint8_t> line = resized(&wide[x], height, columns * 3, rows);
    for (int64_t y = 0; y < rows; ++y) result[y * columns * 3 + x] = line[y];
  }
  return result;
}

bool check_resample(const std::vector<const ResampleKernel*>& kernels) {
  const int64_t height = side(), width = side();
  const int64_t rows = between(0, 4) ? side() : height, columns = between(0, 4) ? side() : width;
  if (height * columns * width + rows * columns * height > 4000000)
    return true;  // slow by definition
  std::vector<uint8_t> image(static_cast<size_t>(height * width * 3));
  for (uint8_t& v : image) v = static_cast<uint8_t>(between(0, 255));

  Resampling job;
  job.rows = {height, rows, between(0, rows - 1), 0};
  job.columns = {width, columns, between(0, columns - 1), 0};
  job.rows.count = between(1, rows - job.rows.first);
  job.columns.count = between(1, columns - job.columns.first);
  const Range y = resample_support(job.rows), x = resample_support(job.columns);
  job.source_y = y.begin;
  job.source_x = x.begin;
  job.source_height = y.end - y.begin;
  job.source_width = x.end - x.begin;
  const int64_t bytes = 3 * job.source_width;
  job.source_stride = bytes + between(0, 1) * between(0, 40);
  const auto length = static_cast<size_t>((job.source_height - 1) * job.source_stride + bytes);
  const std::unique_ptr<uint8_t[]> source(new uint8_t[length]());
  for (int64_t row = 0; row < job.source_height; ++row)
    memcpy(&source[row * job.source_stride], &image[((y.begin + row) * width + x.begin) * 3],
           static_cast<size_t>(bytes));
  job.source = source.get();
  job.flip = between(0, 1);
  job.kind = static_cast<PixelKind>(between(0, 3));
  job.interleaved = between(0, 1);
  const int64_t size = job.kind == PixelKind::kUint8 ? 1 : job.kind == PixelKind::kFloat32 ? 4 : 2;
  const int64_t entries = job.columns.count * (job.interleaved ? 3 : 1);
  const int64_t area = job.rows.count * job.columns.count;
  job.row_stride = size * entries;
  job.plane_stride = size * area;
  for (int c = 0; c < 3; ++c) {
    job.scale[c] = static_cast<float>(c + 1) / 255.0f;
    job.shift[c] = -0.5f * static_cast<float>(c);
  }

  std::vector<std::unique_ptr<char[]>> results;
  const auto out_bytes = static_cast<size_t>(3 * area * size);
  for (const ResampleKernel* kernel : kernels) {
    const size_t scratch = (plan_bytes(job) + 63) / 64 * 64;
    const std::unique_ptr<void, decltype(&std::free)> memory(std::aligned_alloc(64, scratch),
                                                             std::free);
    memset(memory.get(), 0xa5, scratch);
    results.emplace_back(new char[out_bytes]);
    job.out = results.back().get();
    kernel->resample(job, plan_resampling(job, memory.get()));
    if (memcmp(results.back().get(), results.front().get(), out_bytes) != 0) {
      std::fprintf(stderr, "FAILED: %s differs from portable\n", kernel->name);
      return false;
    }
  }

  const std::vector<uint8_t> whole = definition(image, height, width, rows, columns);
  for (int64_t row = 0; row < job.rows.count; ++row)
    for (int64_t column = 0; column < job.columns.count; ++column)
      for (int64_t c = 0; c < 3; ++c) {
        const int64_t from =
            job.columns.first + (job.flip ? job.columns.count - 1 - column : column);
        const uint8_t wanted = whole[((job.rows.first + row) * columns + from) * 3 + c];
        const int64_t pixel = row * job.columns.count + column;
        const char* entry =
            results.front().get() + size * (job.interleaved ? 3 * pixel + c : c * area + pixel);
        const float value = static_cast<float>(wanted) * job.scale[c] + job.shift[c];
        bool equal = true;
        if (job.kind == PixelKind::kUint8)
          equal = memcmp(entry, &wanted, 1) == 0;
        else if (job.kind == PixelKind::kFloat32)
          equal = memcmp(entry, &value, 4) == 0;
        if (!equal) {
          std::fprintf(stderr, "FAILED: %d x %d to %d x %d at (%d, %d, %d)\n",
                       static_cast<int>(height), static_cast<int>(width), static_cast<int>(rows),
                       static_cast<int>(columns), static_cast<int>(row), static_cast<int>(column),
                       static_cast<int>(c));
          return false;
        }
      }
  return true;
}

// Black outside, and the pixel that the step in fixed point falls on inside.
bool check_rotate() {
  const int64_t height = side(), width = side();
  const int64_t top = between(0, height - 1), left = between(0, width - 1);
  const int64_t rows = between(1, height - top), columns = between(1, width - left);
  const auto length = static_cast<size_t>(height * width * 3);
  const std::unique_ptr<uint8_t[]> image(new uint8_t[length]);
  for (size_t i = 0; i < length; ++i) image[i] = static_cast<uint8_t>(between(1, 255));
  const std::unique_ptr<uint8_t[]> out(new uint8_t[static_cast<size_t>(rows * columns * 3)]);
  const double angle = between(0, 2) ? static_cast<double>(between(-3600, 3600)) / 10.0
                                     : static_cast<double>(between(-8, 8)) * 45.0;
  Rotation r;
  if (!make_rotation(height, width, angle, &r)) return false;
  rotate(r, image.get(), 3 * width, height, width, top, left, rows, columns, out.get(),
         3 * columns);
  for (int64_t i = 0; i < rows * columns; ++i) {
    const int64_t x = left + i % columns, y = top + i / columns;
    const int64_t from_x = (r.x0 + x * r.x_dx + y * r.x_dy) >> 16;
    const int64_t from_y = (r.y0 + x * r.y_dx + y * r.y_dy) >> 16;
    const bool inside = from_x >= 0 && from_x < width && from_y >= 0 && from_y < height;
    const uint8_t black[3] = {};
    const uint8_t* wanted = inside ? &image[(from_y * width + from_x) * 3] : black;
    if (memcmp(&out[i * 3], wanted, 3) != 0) {
      std::fprintf(stderr, "FAILED: rotation by %f\n", angle);
      return false;
    }
  }
  return true;
}

}  // namespace
}  // namespace genkl

int main() {
  const auto kernels = genkl::kernels_here();
  bool good = true;
  for (int i = 0; i < 400 && good; ++i)
    good = genkl::check_resample(kernels) && genkl::check_rotate();
  if (good)
    for (const genkl::ResampleKernel* kernel : kernels) std::printf("%s ok\n", kernel->name);
  return good ? 0 : 1;
}
