#include "rotate.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace genkl {
namespace {

constexpr double kOne = 65536.0;
constexpr int kPointBits = 16;

// As Python's round(x, 15), which takes the noise off the sines of right angles.
double round_15(double x) {
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.15f", x);
  return std::strtod(digits, nullptr);
}

int64_t to_fixed(double x) { return static_cast<int64_t>(std::floor(x * kOne + 0.5)); }

int64_t divide_down(int64_t a, int64_t b) {  // b > 0
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}

// The x of [begin, end) for which 0 <= from + x step < limit.
void narrow(int64_t from, int64_t step, int64_t limit, int64_t& begin, int64_t& end) {
  if (step == 0) {
    if (from < 0 || from >= limit) end = begin;
    return;
  }
  // With a negative step, mirrored: 0 <= (limit - 1 - from) + x (-step) < limit.
  if (step < 0) {
    from = limit - 1 - from;
    step = -step;
  }
  begin = std::max(begin, divide_down(-from + step - 1, step));
  end = std::min(end, divide_down(limit - from + step - 1, step));
}

}  // namespace

bool make_rotation(int64_t height, int64_t width, double degrees, Rotation* rotation) {
  constexpr double kPi = 3.141592653589793;
  double turn = std::fmod(degrees, 360.0);
  if (turn < 0.0) turn += 360.0;
  const double angle = -(turn * (kPi / 180.0));
  const double cosine = round_15(std::cos(angle)), sine = round_15(std::sin(angle));
  const double w = static_cast<double>(width), h = static_cast<double>(height);
  const double centre_x = w / 2.0, centre_y = h / 2.0;
  const double x = cosine * -centre_x + sine * -centre_y + 0.0 + centre_x;
  const double y = -sine * -centre_x + cosine * -centre_y + 0.0 + centre_y;
  for (const double corner_x : {0.0, w})
    for (const double corner_y : {0.0, h})
      if (!(std::fabs(corner_x * cosine + corner_y * sine + x) < 32768.0 &&
            std::fabs(corner_x * -sine + corner_y * cosine + y) < 32768.0))
        return false;
  *rotation = {to_fixed(x + cosine * 0.5 + sine * 0.5),  to_fixed(cosine), to_fixed(sine),
               to_fixed(y + -sine * 0.5 + cosine * 0.5), to_fixed(-sine),  to_fixed(cosine)};
  return true;
}

void rotate(const Rotation& r, const uint8_t* source, int64_t source_stride, int64_t height,
            int64_t width, int64_t top, int64_t left, int64_t rows, int64_t columns, uint8_t* out,
            int64_t out_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    uint8_t* line = out + row * out_stride;
    int64_t x = r.x0 + left * r.x_dx + (top + row) * r.x_dy;
    int64_t y = r.y0 + left * r.y_dx + (top + row) * r.y_dy;
    int64_t begin = 0, end = columns;  // what lies inside the source
    narrow(x, r.x_dx, width << kPointBits, begin, end);
    narrow(y, r.y_dx, height << kPointBits, begin, end);
    if (begin >= end) begin = end = 0;
    std::memset(line, 0, static_cast<size_t>(3 * begin));
    x += begin * r.x_dx;
    y += begin * r.y_dx;
    for (int64_t i = begin; i < end; ++i) {
      const uint8_t* pixel = source + (y >> kPointBits) * source_stride + 3 * (x >> kPointBits);
      std::memcpy(line + 3 * i, pixel, 3);
      x += r.x_dx;
      y += r.y_dx;
    }
    std::memset(line + 3 * end, 0, static_cast<size_t>(3 * (columns - end)));
  }
}

}  // namespace genkl
