// Arrays carved out of one block of memory that the caller owns: kernels allocate nothing.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genkl {
// Unnamed on purpose: code that is compiled for several instruction sets must not share symbols.
namespace {

constexpr size_t kLine = 64;  // bytes of a cache line; every array begins on one

template <typename T>
constexpr T round_up(T n, T step) {
  return (n + step - 1) / step * step;
}

class Carver {
 public:
  explicit Carver(uintptr_t memory) : next_(memory) {}
  template <typename T>
  T* take(size_t count) {
    const uintptr_t here = next_;
    next_ += round_up(count * sizeof(T), kLine);
    return reinterpret_cast<T*>(here);
  }
  uintptr_t next() const { return next_; }

 private:
  uintptr_t next_;
};

}  // namespace
}  // namespace genkl
