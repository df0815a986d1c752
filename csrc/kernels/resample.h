// resample: antialiased bilinear resize, crop, flip and normalisation of an RGB image in one walk.
//
// The result is that of resizing the whole image as PyTorch resizes uint8 images on the CPU
// (torchvision's resize, antialias=True), then cropping a window, then flipping it. Only what the
// window needs is read and computed.
//
//     Pixel i of a resized dimension lies at c = (i + 1/2) s in the full one, s = full / resized. It
//     is the mean of the full pixels j under a triangle as wide as the pixels are apart:
//         w_j ~ max(0, 1 - |j + 1/2 - c| / max(s, 1)),    sum_j w_j = 1
//     In integers: w_j 2^p is rounded to int16, where p is the largest number up to 22 that fits every
//     weight of the dimension, and a mean is (sum_j w_j v_j + 2^(p-1)) >> p. Columns come first and
//     are rounded to bytes, then rows.
//
// A dimension that keeps its size has the one weight 1: its pixels stay as they are.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genkl {

constexpr int kMaxSide = 1 << 20;  // pixels: sums of weighted bytes stay below 2^31

// Pixels [first, first + count) of a dimension that is resized from `full` to `resized` pixels.
struct Span {
  int64_t full;
  int64_t resized;
  int64_t first;
  int64_t count;
};

struct Range {
  int64_t begin;
  int64_t end;
};

// The full pixels that a span is computed from.
Range resample_support(const Span& span);

enum class PixelKind : int { kUint8, kFloat32, kFloat16, kBFloat16 };

struct Resampling {
  const uint8_t* source;  // [source_height, source_width, 3], the decoded region of the full image
  int64_t source_stride;  // bytes from row to row
  int64_t source_height;
  int64_t source_width;
  int64_t source_y;  // where the region lies in the full image
  int64_t source_x;
  Span rows;
  Span columns;
  bool flip;  // left to right

  void* out;  // planar [3, rows, columns], or interleaved [rows, columns, 3]
  bool interleaved;
  int64_t row_stride;  // bytes
  int64_t plane_stride;
  // kUint8: v as it is; else v * scale + shift in float32, rounded after each step, and for 16 bits
  // once more, to nearest even.
  PixelKind kind;
  float scale[3];
  float shift[3];
};

// Weights of a span's pixels.
struct Taps {
  int32_t pairs;      // a pixel has 2 * pairs taps
  int32_t stride;     // entries of `weights` from pixel to pixel
  int32_t precision;  // p
  int32_t* start;     // [count] first tap, counted from the source's first row or column
  int16_t* weights;   // [count, stride]
};

// Everything that does not depend on the instruction set: weights, and where things lie in the
// scratch memory.
struct ResamplePlan {
  Taps rows;
  Taps columns;         // in the order of the output, padded to whole groups of kColumnGroup
  int64_t line_stride;  // bytes of a line: a row of the window, packed RGB
  uint8_t* lines;       // [ring, line_stride] source rows whose columns are filtered: y at y % ring
  int64_t ring;
  uint8_t* line;     // [line_stride + 32] a row of the result, in bytes
  uint8_t* guarded;  // [kRowGroup, guarded_stride] copies of source rows close to its end
  int64_t guarded_stride;
  int64_t read_past;     // bytes past its end that filtering a row may read
  const uint8_t** taps;  // [2 * rows.pairs] the lines that a row is computed from
  double* heights;       // the weights of one pixel while they are computed
};

constexpr int kRowGroup = 4;     // source rows whose columns are filtered together
constexpr int kColumnGroup = 4;  // columns that are filtered together
constexpr int kLineStep = 32;    // bytes of a line that are filtered together

// Bytes that a plan takes, and the plan, laid out in `memory` (64-byte aligned).
size_t plan_bytes(const Resampling& job);
ResamplePlan plan_resampling(const Resampling& job, void* memory);

// One way to walk the pixels, compiled for one instruction set.
struct ResampleKernel {
  const char* name;
  void (*resample)(const Resampling& job, const ResamplePlan& plan);
};

// The kernel that stands beside nc_kernel(name); null when there is none.
const ResampleKernel* resample_kernel(const char* name);

}  // namespace genkl
