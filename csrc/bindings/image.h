// The image functions of genkl_ext._native, see image.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace genkl {

void bind_image_functions(pybind11::module_& m);

}  // namespace genkl
