// Image functions of genkl_ext._native: resample and rotate on NumPy arrays. Called once per image
// from many threads: the interpreter is free while they work, and every thread keeps its scratch
// memory.
#include "image.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <cstring>
#include <string>

#include "../kernels/resample.h"
#include "../kernels/rotate.h"
#include "common.h"

namespace py = pybind11;

namespace genkl {
namespace {

using Pair = std::array<int64_t, 2>;
using Window = std::array<int64_t, 4>;
using Colour = std::array<float, 3>;

template <size_t kSize>
std::string text(const std::array<int64_t, kSize>& values) {
  std::string result = "(";
  for (size_t i = 0; i < kSize; ++i) result += (i ? ", " : "") + std::to_string(values[i]);
  return result + ")";
}

std::string describe(const py::array& array) {
  std::string shape, strides;
  for (py::ssize_t i = 0; i < array.ndim(); ++i) {
    shape += (i ? ", " : "") + std::to_string(array.shape(i));
    strides += (i ? ", " : "") + std::to_string(array.strides(i));
  }
  return "shape (" + shape + "), strides (" + strides + "), " +
         py::str(array.dtype()).cast<std::string>();
}

void require(bool holds, const char* operation, const std::string& wanted,
             const std::string& came) {
  if (!holds) throw py::value_error(std::string(operation) + ": " + wanted + ", got " + came);
}

// A thread's memory for one call, kept for its next.
void* scratch(size_t bytes) {
  thread_local AlignedMemory memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    memory.reset();
    size = 0;
    memory = allocate_aligned(bytes);
    size = bytes;
  }
  return memory.get();
}

// (h, w, 3) bytes whose rows may be apart, but not their pixels.
bool is_picture(const py::array& array) {
  return array.ndim() == 3 && array.shape(2) == 3 && array.shape(0) > 0 && array.shape(1) > 0 &&
         array.dtype().kind() == 'u' && array.itemsize() == 1 && array.strides(2) == 1 &&
         (array.shape(1) == 1 || array.strides(1) == 3) &&
         (array.shape(0) == 1 || array.strides(0) >= 3 * array.shape(1));
}

void check_picture(const py::array& array, const char* operation, const char* name) {
  if (!is_picture(array))
    require(false, operation,
            std::string(name) + " must be a (h, w, 3) uint8 array with packed pixels",
            describe(array));
}

PixelKind kind_of(const std::string& name) {
  if (name == "uint8") return PixelKind::kUint8;
  if (name == "float32") return PixelKind::kFloat32;
  if (name == "float16") return PixelKind::kFloat16;
  if (name == "bfloat16") return PixelKind::kBFloat16;
  throw py::value_error("resample: kind must be uint8, float32, float16 or bfloat16, got " + name);
}

bool holds_kind(const py::array& array, PixelKind kind) {
  const char type = array.dtype().kind();
  const py::ssize_t size = array.itemsize();
  switch (kind) {
    case PixelKind::kUint8:
      return type == 'u' && size == 1;
    case PixelKind::kFloat32:
      return type == 'f' && size == 4;
    case PixelKind::kFloat16:
      return (type == 'u' || type == 'f') && size == 2;
    default:
      return type == 'u' && size == 2;
  }
}

// Where the entries of `out` go; false when its strides are neither of the two layouts.
bool describe_out(Resampling& job, py::array& out) {
  const int64_t size = out.itemsize(), rows = out.shape(1), columns = out.shape(2);
  const int64_t channel = out.strides(0), row = out.strides(1), column = out.strides(2);
  if (reinterpret_cast<uintptr_t>(out.data()) % static_cast<size_t>(size) != 0) return false;
  if (row % size != 0 || channel % size != 0) return false;
  job.row_stride = row;
  job.plane_stride = channel;
  job.interleaved = channel == size && (columns == 1 || column == 3 * size);
  if (job.interleaved) return rows == 1 || row >= 3 * size * columns;
  return (columns == 1 || column == size) && (rows == 1 || row >= size * columns) &&
         channel >= (rows == 1 ? size * columns : row * (rows - 1) + size * columns);
}

void check_side(const char* name, const Pair& sides) {
  require(sides[0] >= 1 && sides[1] >= 1 && sides[0] <= kMaxSide && sides[1] <= kMaxSide,
          "resample", std::string(name) + " must be (height, width) of 1 to 1048576 pixels",
          text(sides));
}

void resample(const py::array& source, const Pair& origin, const Pair& full, const Pair& resized,
              const Window& window, bool flip, py::array out, const std::string& kind,
              const Colour& scale, const Colour& shift, const std::string& simd) {
  constexpr const char* kName = "resample";
  Resampling job;
  check_picture(source, kName, "source");
  check_side("full", full);
  check_side("resized", resized);
  for (int i = 0; i < 2; ++i)
    require(window[i] >= 0 && window[2 + i] >= 1 && window[2 + i] <= resized[i] &&
                window[i] <= resized[i] - window[2 + i],
            kName, "window (top, left, height, width) must lie in resized " + text(resized),
            text(window));
  job.rows = {full[0], resized[0], window[0], window[2]};
  job.columns = {full[1], resized[1], window[1], window[3]};

  job.source = static_cast<const uint8_t*>(source.data());
  job.source_height = source.shape(0);
  job.source_width = source.shape(1);
  job.source_stride = source.strides(0);
  job.source_y = origin[0];
  job.source_x = origin[1];
  const Range y = resample_support(job.rows), x = resample_support(job.columns);
  const bool inside = origin[0] >= 0 && origin[1] >= 0 && job.source_height <= full[0] &&
                      job.source_width <= full[1] && origin[0] <= full[0] - job.source_height &&
                      origin[1] <= full[1] - job.source_width;
  const Window region = {origin[0], origin[1], job.source_height, job.source_width};
  if (!inside)
    require(false, kName, "source must lie in the full image " + text(full),
            "(top, left, height, width) " + text(region));
  if (y.begin < origin[0] || x.begin < origin[1] || y.end > origin[0] + job.source_height ||
      x.end > origin[1] + job.source_width)
    require(false, kName,
            "source must cover (top, left, height, width) " +
                text(Window{y.begin, x.begin, y.end - y.begin, x.end - x.begin}) +
                " of the full image",
            text(region));

  job.flip = flip;
  job.kind = kind_of(kind);
  const bool fits = out.ndim() == 3 && out.shape(0) == 3 && out.shape(1) == window[2] &&
                    out.shape(2) == window[3] && out.writeable() && holds_kind(out, job.kind) &&
                    describe_out(job, out);
  if (!fits)
    require(false, kName,
            "out must be a writable " + kind + " array (3, " + std::to_string(window[2]) + ", " +
                std::to_string(window[3]) + "), planar or interleaved" +
                (job.kind == PixelKind::kFloat16 || job.kind == PixelKind::kBFloat16
                     ? ", 16 bits as uint16"
                     : ""),
            describe(out));
  job.out = out.mutable_data();
  for (int c = 0; c < 3; ++c) {
    require(std::isfinite(scale[c]) && std::isfinite(shift[c]), kName,
            "scale and shift must be finite",
            std::to_string(scale[c]) + " and " + std::to_string(shift[c]));
    job.scale[c] = scale[c];
    job.shift[c] = shift[c];
  }

  const ResampleKernel* kernel = resample_kernel(simd.c_str());
  if (!kernel)
    throw py::value_error("resample: no kernel for " + (simd.empty() ? "GENKL_SIMD" : simd) +
                          " on this processor");
  py::gil_scoped_release release;
  kernel->resample(job, plan_resampling(job, scratch(plan_bytes(job))));
}

py::tuple support(int64_t full, int64_t resized, int64_t first, int64_t count) {
  constexpr const char* kName = "resample_support";
  require(full >= 1 && full <= kMaxSide, kName, "full must be 1 to 1048576", std::to_string(full));
  require(resized >= 1 && resized <= kMaxSide, kName, "resized must be 1 to 1048576",
          std::to_string(resized));
  require(first >= 0 && count >= 1 && count <= resized && first <= resized - count, kName,
          "first and count must lie in resized " + std::to_string(resized),
          std::to_string(first) + " and " + std::to_string(count));
  const Range range = resample_support({full, resized, first, count});
  return py::make_tuple(range.begin, range.end);
}

void rotate_array(const py::array& source, double degrees, const Window& window, py::array out) {
  constexpr const char* kName = "rotate";
  check_picture(source, kName, "source");
  check_picture(out, kName, "out");
  const int64_t height = source.shape(0), width = source.shape(1);
  const auto [top, left, rows, columns] = window;
  require(top >= 0 && left >= 0 && rows >= 1 && columns >= 1 && rows <= height &&
              columns <= width && top <= height - rows && left <= width - columns,
          kName,
          "window (top, left, height, width) must lie in source " + text(Pair{height, width}),
          text(window));
  require(out.shape(0) == rows && out.shape(1) == columns && out.writeable(), kName,
          "out must be a writable array (" + std::to_string(rows) + ", " + std::to_string(columns) +
              ", 3)",
          describe(out));
  require(std::isfinite(degrees), kName, "angle must be finite", std::to_string(degrees));
  Rotation rotation;
  require(make_rotation(height, width, degrees, &rotation), kName,
          "source must stay within 32768 pixels when rotated", text(Pair{height, width}));
  const uint8_t* from = static_cast<const uint8_t*>(source.data());
  uint8_t* to = static_cast<uint8_t*>(out.mutable_data());
  const int64_t from_stride = source.strides(0), to_stride = out.strides(0);
  py::gil_scoped_release release;
  rotate(rotation, from, from_stride, height, width, top, left, rows, columns, to, to_stride);
}

}  // namespace

void bind_image_functions(py::module_& m) {
  m.def("resample", &resample, py::arg("source"), py::arg("origin"), py::arg("full"),
        py::arg("resized"), py::arg("window"), py::arg("flip"), py::arg("out"), py::arg("kind"),
        py::arg("scale"), py::arg("shift"), py::arg("simd") = "",
        "Writes a window of a resized image to out; source is the region of the full image that "
        "begins at origin.");
  m.def("resample_support", &support, py::arg("full"), py::arg("resized"), py::arg("first"),
        py::arg("count"),
        "The pixels [start, stop) of one dimension of the full image that resized pixels "
        "[first, first + count) are computed from.");
  m.def("rotate", &rotate_array, py::arg("source"), py::arg("angle"), py::arg("window"),
        py::arg("out"),
        "Writes a window of source, rotated counter-clockwise by angle degrees, to out.");
}

}  // namespace genkl
