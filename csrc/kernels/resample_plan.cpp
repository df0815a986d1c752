// What the walks of resample.cpp share and need only once: weights, scratch memory, and which walk
// this processor runs.
#include <cmath>
#include <cstring>

#include "nc_score.h"
#include "resample.h"
#include "scratch.h"

namespace genkl {

#if defined(__x86_64__)
extern const ResampleKernel kResampleKernelAvx512, kResampleKernelAvx2;
#endif
extern const ResampleKernel kResampleKernelPortable;

namespace {

const ResampleKernel* const kBuilt[] = {
#if defined(__x86_64__)
    &kResampleKernelAvx512, &kResampleKernelAvx2,
#endif
    &kResampleKernelPortable};

constexpr int kMaxPrecision = 22;

// The triangle of a dimension, moved from pixel to pixel. The order of every operation is that of
// PyTorch: its weights are reached to the last bit.
class Triangle {
 public:
  explicit Triangle(const Span& span)
      : full_(span.full),
        scale_(static_cast<double>(span.full) / static_cast<double>(span.resized)),
        support_(scale_ >= 1.0 ? scale_ : 1.0),
        inverse_(scale_ >= 1.0 ? 1.0 / scale_ : 1.0),
        max_taps_(static_cast<int64_t>(std::ceil(support_)) * 2 + 1) {}

  // No pixel has more taps.
  int64_t max_taps() const { return max_taps_ < full_ ? max_taps_ : full_; }

  Range range(int64_t pixel) const {
    const double c = centre(pixel);
    int64_t begin = static_cast<int64_t>(c - support_ + 0.5);
    int64_t end = static_cast<int64_t>(c + support_ + 0.5);
    if (begin < 0) begin = 0;
    if (end > full_) end = full_;
    if (end > begin + max_taps_) end = begin + max_taps_;
    return {begin, end};
  }

  // Heights above the full pixels of a range when the triangle stands over `pixel`; returns their
  // sum. visit(j, height) is called for each in turn.
  template <typename Visit>
  double heights(int64_t pixel, const Range& range, Visit visit) const {
    const double c = centre(pixel);
    double sum = 0.0;
    for (int64_t j = range.begin; j < range.end; ++j) {
      const double x = std::fabs((static_cast<double>(j) - c + 0.5) * inverse_);
      const double height = x < 1.0 ? 1.0 - x : 0.0;
      sum += height;
      visit(j, height);
    }
    return sum;
  }

  double largest_weight(int64_t pixel) const {
    double highest = 0.0;
    const double sum = heights(pixel, range(pixel), [&](int64_t, double height) {
      highest = height > highest ? height : highest;
    });
    return highest / sum;
  }

  double scale() const { return scale_; }

 private:
  double centre(int64_t pixel) const { return scale_ * (static_cast<double>(pixel) + 0.5); }

  int64_t full_;
  double scale_, support_, inverse_;
  int64_t max_taps_;
};

int precision_for(double largest_weight) {
  int precision = 0;
  while (precision < kMaxPrecision &&
         static_cast<int>(0.5 + largest_weight * (1 << (precision + 1))) < (1 << 15))
    ++precision;
  return precision;
}

// The precision at which every weight of the dimension, inside the window or not, fits int16.
//
// The image cuts only the first and the last triangle. Of the others, let d <= 1/2 be the distance
// from the centre to the nearest full pixel, and s = full / resized >= 1. The heights are the
// trapezoidal rule for the triangle, whose kinks make it err: their sum is at least
// s - d (1 - d) / s, the highest is 1 - d / s, and their ratio, the largest weight, at most 1 / s.
// With s < 1 the first pixel has the one weight 1. So two pixels mostly settle the precision.
int find_precision(const Triangle& triangle, int64_t resized) {
  const double first = triangle.largest_weight(0), last = triangle.largest_weight(resized - 1);
  double largest = first > last ? first : last;
  const double bound = (1.0 + 1e-9) / triangle.scale();
  const int precision = precision_for(largest);
  if (largest >= 1.0 || largest >= bound || precision_for(bound) == precision) return precision;
  for (int64_t i = 1; i < resized - 1; ++i) {
    const double weight = triangle.largest_weight(i);
    largest = weight > largest ? weight : largest;
  }
  return precision_for(largest);
}

Taps lay_out_taps(Carver& carver, const Span& span, int64_t padded_count) {
  Taps taps;
  const int64_t pairs = (Triangle(span).max_taps() + 1) / 2;
  taps.pairs = static_cast<int32_t>(pairs);
  taps.stride = taps.pairs * 2;
  taps.precision = 0;
  taps.start = carver.take<int32_t>(padded_count);
  taps.weights = carver.take<int16_t>(padded_count * 2 * pairs);
  return taps;
}

// Fills the taps of a span; those at its end are repeated up to padded_count. `heights` has room for
// the taps of one pixel.
void fill_taps(Taps& taps, const Span& span, int64_t source_first, bool reversed,
               int64_t padded_count, double* heights) {
  const Triangle triangle(span);
  taps.precision = find_precision(triangle, span.resized);
  const double one = static_cast<double>(1 << taps.precision);
  int64_t most = 1;
  for (int64_t i = 0; i < padded_count; ++i) {
    const int64_t place = i < span.count ? i : span.count - 1;
    const int64_t pixel = span.first + (reversed ? span.count - 1 - place : place);
    const Range range = triangle.range(pixel);
    const double sum = triangle.heights(
        pixel, range, [&](int64_t j, double height) { heights[j - range.begin] = height; });
    int16_t* weights = taps.weights + i * taps.stride;
    const int64_t count = range.end - range.begin;
    int64_t skipped = 0, used = 0;  // pixels at the ends whose weight is 0 are no taps
    for (int64_t t = 0; t < count; ++t) {
      const int weight = static_cast<int>(0.5 + heights[t] / sum * one);
      weights[t - skipped] = static_cast<int16_t>(weight);
      if (weight != 0)
        used = t - skipped + 1;
      else if (used == 0)
        ++skipped;
    }
    for (int64_t t = used; t < taps.stride; ++t) weights[t] = 0;
    taps.start[i] = static_cast<int32_t>(range.begin + skipped - source_first);
    most = used > most ? used : most;
  }
  taps.pairs = static_cast<int32_t>((most + 1) / 2);
}

ResamplePlan lay_out(const Resampling& job, Carver& carver) {
  ResamplePlan plan;
  plan.rows = lay_out_taps(carver, job.rows, job.rows.count);
  plan.columns =
      lay_out_taps(carver, job.columns, round_up<int64_t>(job.columns.count, kColumnGroup));
  // A group of columns is stored as 16 bytes, of which 12 are its own.
  plan.line_stride =
      round_up<int64_t>(3 * round_up<int64_t>(job.columns.count, kColumnGroup) + 4, kLineStep);
  plan.ring = 2 * plan.rows.pairs + kRowGroup;
  plan.lines = carver.take<uint8_t>(plan.ring * plan.line_stride);
  plan.line = carver.take<uint8_t>(plan.line_stride + 32);
  // Two pairs of taps are 12 of 16 bytes read.
  plan.read_past = 12 * ((plan.columns.pairs + 1) / 2) + 4;
  plan.guarded_stride = 3 * job.source_width + plan.read_past;
  plan.guarded = carver.take<uint8_t>(kRowGroup * plan.guarded_stride);
  plan.taps = carver.take<const uint8_t*>(2 * plan.rows.pairs);
  plan.heights = carver.take<double>(
      2 * (plan.rows.pairs > plan.columns.pairs ? plan.rows.pairs : plan.columns.pairs));
  return plan;
}

}  // namespace

Range resample_support(const Span& span) {
  if (span.full == span.resized) return {span.first, span.first + span.count};
  const Triangle triangle(span);
  return {triangle.range(span.first).begin, triangle.range(span.first + span.count - 1).end};
}

size_t plan_bytes(const Resampling& job) {
  Carver carver(0);
  lay_out(job, carver);
  return carver.next();
}

ResamplePlan plan_resampling(const Resampling& job, void* memory) {
  Carver carver(reinterpret_cast<uintptr_t>(memory));
  ResamplePlan plan = lay_out(job, carver);
  fill_taps(plan.rows, job.rows, job.source_y, false, job.rows.count, plan.heights);
  fill_taps(plan.columns, job.columns, job.source_x, job.flip,
            round_up<int64_t>(job.columns.count, kColumnGroup), plan.heights);
  return plan;
}

const ResampleKernel* resample_kernel(const char* name) {
  const NcKernel* chosen = nc_kernel(name);
  if (!chosen) return nullptr;
  for (const ResampleKernel* kernel : kBuilt)
    if (strcmp(kernel->name, chosen->name) == 0) return kernel;
  return nullptr;
}

}  // namespace genkl
