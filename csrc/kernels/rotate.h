// rotate: a window of an RGB image turned about its centre, nearest neighbour, black outside.
//
// Pixel for pixel what Pillow's Image.rotate(angle) makes, which steps through the source in fixed
// point: 16 bits before the point, 16 after.
#pragma once

#include <cstdint>

namespace genkl {

// Where in the source, in units of 2^-16 pixels, the centre of rotated pixel (x, y) lies:
// (x0 + x dx + y dy, ...).
struct Rotation {
  int64_t x0, x_dx, x_dy;
  int64_t y0, y_dx, y_dy;
};

// The rotation of an image by `degrees`, counter-clockwise. False when the image is too large for
// fixed point.
bool make_rotation(int64_t height, int64_t width, double degrees, Rotation* rotation);

void rotate(const Rotation& rotation,
            const uint8_t* source,  // [height, width, 3], rows source_stride bytes apart
            int64_t source_stride, int64_t height, int64_t width,  //
            int64_t top, int64_t left, int64_t rows, int64_t columns,
            uint8_t* out,  // [rows, columns, 3], rows out_stride bytes apart
            int64_t out_stride);

}  // namespace genkl
