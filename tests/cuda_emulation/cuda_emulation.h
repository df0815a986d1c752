// The CUDA of csrc/kernels run on the host, for tests on machines without a GPU. A .cu file compiles as
// plain C++ when this folder comes first among the include folders: the headers beside this one stand
// in for CUDA's.
//
// Every CUDA thread is a fiber. A fiber runs until it meets others (__syncthreads, __syncwarp, a
// shuffle, a vote, a reduction), and then any fiber that can go on does, drawn by a seeded generator:
// what one thread writes is there for another only when a meeting lies between. Blocks run one after
// another, in drawn order. cudaLaunchKernelEx throws Failure where a GPU would hang or misbehave:
//
//   - lanes of a warp meet in different functions or with different masks
//   - a meeting names a lane that has left, or that waits elsewhere for good
//   - some threads of a block wait in __syncthreads while others have left
//   - a wide load is not aligned; a write runs past the dynamic shared memory (with the address
//     sanitizer, a read too)
//
// Shared memory holds noise when a block starts. What is not emulated does not compile.
#pragma once

#include <ucontext.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
// One thread of the host runs all fibers, so this is memory that they share.
#define __shared__ thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// The dynamic shared memory, by the name that the kernels give it.
constexpr size_t kSharedBytes = 48 * 1024;
constexpr size_t kSharedMargin = 1024;
alignas(128) inline thread_local uint4
    shared_memory[(kSharedBytes + kSharedMargin) / sizeof(uint4)];

namespace cuda_emulation {

constexpr unsigned kWarpLanes = 32;
constexpr size_t kStackBytes = 256 * 1024;
constexpr unsigned char kUntouched = 0xa5;

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

enum class Meeting { kNone, kBlock, kSyncWarp, kShuffle, kVote, kReduce };
enum class State { kReady, kWaits, kLeft };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack;
  void* sanitizer_stack = nullptr;
  unsigned number = 0;  // within the block
  State state = State::kReady;
  Meeting meeting = Meeting::kNone;
  unsigned mask = 0;
  uint64_t given = 0;                         // to the meeting, by this fiber
  std::array<uint64_t, kWarpLanes> received;  // by all lanes
};

class Machine {
 public:
  static Machine& get() {
    static thread_local Machine machine;
    return machine;
  }

  void seed(uint64_t seed) { random_.seed(seed); }
  uint64_t draw() { return random_(); }
  uint64_t meetings() const { return meetings_; }
  uint64_t launches() const { return launches_; }

  dim3 grid, block, block_index;
  Fiber* current = nullptr;

  cudaError_t launch(const cudaLaunchConfig_t& config, std::function<void()> body) {
    grid = config.gridDim;
    block = config.blockDim;
    if (grid.x == 0 || grid.y != 1 || grid.z != 1 || block.x == 0 || block.x > 1024 ||
        block.y != 1 || block.z != 1 || config.dynamicSmemBytes > kSharedBytes)
      return cudaErrorInvalidConfiguration;
    ++launches_;
    body_ = std::move(body);
    std::vector<unsigned> order(grid.x);
    for (unsigned i = 0; i < grid.x; ++i) order[i] = i;
    shuffle(order);
    for (unsigned index : order) {
      block_index = dim3(index);
      run_block(config.dynamicSmemBytes);
    }
    current = nullptr;
    return cudaSuccess;
  }

  // The calling fiber waits until every lane of `mask` has come to the same meeting.
  void meet(Meeting meeting, unsigned mask, uint64_t value) {
    Fiber& fiber = *current;
    fiber.meeting = meeting;
    fiber.mask = mask;
    fiber.given = value;
    fiber.state = State::kWaits;
    if (meeting != Meeting::kBlock && !(mask >> lane() & 1)) fail("a lane is not in its own mask");
    ++meetings_;
    suspend();
  }

  unsigned lane() const { return current->number % kWarpLanes; }

  // Of a fiber: its launch fails. What stands on the fiber's stack is never destroyed.
  [[noreturn]] void fail(const char* what) {
    failure_ = what;
    suspend();
    std::abort();  // a failed launch never goes on
  }

 private:
  static void enter() {
    Machine& machine = get();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.host_stack_, &machine.host_stack_size_);
#endif
    machine.body_();
    machine.current->state = State::kLeft;
    machine.suspend();
  }

  void suspend() {
    Fiber& fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
    const bool leaves = fiber.state == State::kLeft;
    __sanitizer_start_switch_fiber(leaves ? nullptr : &fiber.sanitizer_stack, host_stack_,
                                   host_stack_size_);
#endif
    swapcontext(&fiber.context, &host_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.sanitizer_stack, &host_stack_, &host_stack_size_);
#endif
  }

  void resume(Fiber& fiber) {
    current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
    void* own = nullptr;
    __sanitizer_start_switch_fiber(&own, fiber.stack.get(), kStackBytes);
#endif
    swapcontext(&host_, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(own, nullptr, nullptr);
#endif
    if (failure_) raise(failure_);
  }

  [[noreturn]] void raise(const std::string& what) {
    const std::string place = " (block " + std::to_string(block_index.x) + ", thread " +
                              (current ? std::to_string(current->number) : "?") + ")";
    failure_ = nullptr;
    current = nullptr;
    guard_shared(0);
    throw Failure(what + place);
  }

  void run_block(size_t shared_bytes) {
    prepare_shared(shared_bytes);
    const unsigned count = block.x;
    while (fibers_.size() < count) fibers_.push_back(std::make_unique<Fiber>());
    ready_.clear();
    for (unsigned i = 0; i < count; ++i) {
      Fiber& fiber = *fibers_[i];
      if (!fiber.stack) fiber.stack.reset(new unsigned char[kStackBytes]);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
      fiber.number = i;
      fiber.state = State::kReady;
      ready_.push_back(&fiber);
    }
    unsigned left = 0, at_barrier = 0;
    while (left < count) {
      if (ready_.empty()) {
        if (at_barrier > 0 && at_barrier + left == count && left > 0)
          raise("__syncthreads waits for threads that have left");
        raise("no thread can go on: " + describe_waiting(count));
      }
      const size_t pick = random_() % ready_.size();
      Fiber& fiber = *ready_[pick];
      ready_[pick] = ready_.back();
      ready_.pop_back();
      resume(fiber);
      if (fiber.state == State::kLeft) {
        ++left;
        check_deserted(fiber, count);
      } else if (fiber.meeting == Meeting::kBlock) {
        if (++at_barrier == count) {
          at_barrier = 0;
          for (unsigned i = 0; i < count; ++i) release(*fibers_[i]);
        }
      } else {
        complete_meeting(fiber, count);
      }
    }
    check_shared(shared_bytes);
  }

  void release(Fiber& fiber) {
    fiber.state = State::kReady;
    fiber.meeting = Meeting::kNone;
    ready_.push_back(&fiber);
  }

  // Lets the lanes of a warp go on when the last of them has come.
  void complete_meeting(Fiber& last, unsigned count) {
    const unsigned first = last.number / kWarpLanes * kWarpLanes;
    bool complete = true;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (!(last.mask >> lane & 1)) continue;
      if (first + lane >= count) raise("a mask names a lane that the block does not have");
      const Fiber& other = *fibers_[first + lane];
      if (other.state == State::kLeft) raise("a meeting waits for a lane that has left");
      if (other.state != State::kWaits) {
        complete = false;
      } else if (other.meeting != last.meeting || other.mask != last.mask) {
        raise("lanes of a warp meet in different places: " + std::string(name(last.meeting)) +
              " and " + name(other.meeting));
      }
    }
    if (!complete) return;
    std::array<uint64_t, kWarpLanes> given{};
    for (unsigned lane = 0; lane < kWarpLanes; ++lane)
      if (last.mask >> lane & 1) given[lane] = fibers_[first + lane]->given;
    const unsigned mask = last.mask;
    for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
      if (!(mask >> lane & 1)) continue;
      fibers_[first + lane]->received = given;
      release(*fibers_[first + lane]);
    }
  }

  // A lane that leaves must not be waited for.
  void check_deserted(const Fiber& gone, unsigned count) {
    const unsigned first = gone.number / kWarpLanes * kWarpLanes;
    for (unsigned i = first; i < first + kWarpLanes && i < count; ++i) {
      const Fiber& other = *fibers_[i];
      if (other.state == State::kWaits && other.meeting != Meeting::kBlock &&
          other.mask >> (gone.number % kWarpLanes) & 1)
        raise("a meeting waits for a lane that has left");
    }
  }

  static const char* name(Meeting meeting) {
    switch (meeting) {
      case Meeting::kBlock:
        return "__syncthreads";
      case Meeting::kSyncWarp:
        return "__syncwarp";
      case Meeting::kShuffle:
        return "a shuffle";
      case Meeting::kVote:
        return "a vote";
      case Meeting::kReduce:
        return "a reduction";
      default:
        return "nothing";
    }
  }

  std::string describe_waiting(unsigned count) const {
    std::string text;
    for (unsigned i = 0; i < count; ++i)
      if (fibers_[i]->state == State::kWaits)
        return "thread " + std::to_string(i) + " waits in " + name(fibers_[i]->meeting);
    return text;
  }

  template <typename T>
  void shuffle(std::vector<T>& items) {
    for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[random_() % i]);
  }

  // ---- shared memory: noise, then bytes that nobody may touch

  static unsigned char* shared() { return reinterpret_cast<unsigned char*>(shared_memory); }

  void guard_shared([[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(shared(), kSharedBytes + kSharedMargin);
    if (bytes > 0)
      __asan_poison_memory_region(shared() + bytes, kSharedBytes + kSharedMargin - bytes);
#endif
  }

  void prepare_shared(size_t bytes) {
    guard_shared(0);
    for (size_t i = 0; i < bytes; i += 8) {
      const uint64_t noise = random_();
      std::memcpy(shared() + i, &noise, bytes - i < 8 ? bytes - i : 8);
    }
    std::memset(shared() + bytes, kUntouched, kSharedBytes + kSharedMargin - bytes);
    guard_shared(bytes > 0 ? bytes : 0);
  }

  void check_shared(size_t bytes) {
    guard_shared(0);
    for (size_t i = bytes; i < kSharedBytes + kSharedMargin; ++i)
      if (shared()[i] != kUntouched) raise("a write past the dynamic shared memory");
  }

  std::mt19937_64 random_{1};
  std::function<void()> body_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> ready_;
  ucontext_t host_;
  const char* failure_ = nullptr;
  uint64_t meetings_ = 0, launches_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  const void* host_stack_ = nullptr;
  size_t host_stack_size_ = 0;
#endif
};

inline Machine& machine() { return Machine::get(); }

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a lane gives 8 bytes at most");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of the lane that source(own lane) names, one's own where that is no lane of the warp.
template <typename T, typename Source>
T exchange(unsigned mask, T value, Source source) {
  Machine& m = machine();
  const unsigned own = m.lane();
  m.meet(Meeting::kShuffle, mask, pack(value));
  const int from = source(static_cast<int>(own));
  if (from < 0 || from >= static_cast<int>(kWarpLanes)) return value;
  if (!(mask >> from & 1)) m.fail("a shuffle reads from a lane outside its mask");
  return unpack<T>(m.current->received[static_cast<size_t>(from)]);
}

inline unsigned vote(unsigned mask, bool predicate) {
  Machine& m = machine();
  m.meet(Meeting::kVote, mask, predicate);
  unsigned ballot = 0;
  for (unsigned lane = 0; lane < kWarpLanes; ++lane)
    if (mask >> lane & 1) ballot |= static_cast<unsigned>(m.current->received[lane]) << lane;
  return ballot;
}

template <typename T, typename Fold>
T reduce(unsigned mask, T value, Fold fold) {
  Machine& m = machine();
  m.meet(Meeting::kReduce, mask, pack(value));
  bool first = true;
  T result{};
  for (unsigned lane = 0; lane < kWarpLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const T other = unpack<T>(m.current->received[lane]);
    result = first ? other : fold(result, other);
    first = false;
  }
  return result;
}

template <typename T>
T load_aligned(const T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T) != 0) machine().fail("a load is not aligned");
  return *p;
}

// One of CUDA's built-in variables; grids and blocks have one dimension.
template <unsigned (*kRead)()>
struct BuiltIn {
  struct {
    operator unsigned() const { return kRead(); }
  } x;
};
inline unsigned read_thread() { return machine().current->number; }
inline unsigned read_block() { return machine().block_index.x; }
inline unsigned read_block_size() { return machine().block.x; }
inline unsigned read_grid_size() { return machine().grid.x; }

}  // namespace cuda_emulation

inline constexpr cuda_emulation::BuiltIn<cuda_emulation::read_thread> threadIdx{};
inline constexpr cuda_emulation::BuiltIn<cuda_emulation::read_block> blockIdx{};
inline constexpr cuda_emulation::BuiltIn<cuda_emulation::read_block_size> blockDim{};
inline constexpr cuda_emulation::BuiltIn<cuda_emulation::read_grid_size> gridDim{};

inline void __syncthreads() {
  cuda_emulation::machine().meet(cuda_emulation::Meeting::kBlock, 0, 0);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_emulation::machine().meet(cuda_emulation::Meeting::kSyncWarp, mask, 0);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return cuda_emulation::exchange(mask, value, [&](int) { return lane & 31; });
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return cuda_emulation::exchange(mask, value, [&](int own) { return own ^ bits; });
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned apart) {
  return cuda_emulation::exchange(mask, value,
                                  [&](int own) { return own - static_cast<int>(apart); });
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned apart) {
  return cuda_emulation::exchange(mask, value,
                                  [&](int own) { return own + static_cast<int>(apart); });
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  return cuda_emulation::vote(mask, predicate);
}
inline int __any_sync(unsigned mask, bool predicate) {
  return cuda_emulation::vote(mask, predicate) != 0;
}
inline int __all_sync(unsigned mask, bool predicate) {
  return cuda_emulation::vote(mask, predicate) == mask;
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned value) {
  return cuda_emulation::reduce(mask, value, [](unsigned a, unsigned b) { return a > b ? a : b; });
}
inline int __reduce_add_sync(unsigned mask, int value) {
  return cuda_emulation::reduce(mask, value, [](int a, int b) { return a + b; });
}
inline unsigned long long atomicMin(unsigned long long* p, unsigned long long value) {
  const unsigned long long before = *p;
  if (value < before) *p = value;
  return before;
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <typename T>
T __ldg(const T* p) {
  return cuda_emulation::load_aligned(p);
}
template <typename T>
T __ldcs(const T* p) {
  return cuda_emulation::load_aligned(p);
}
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

struct __half {
  unsigned short bits;
};
struct __nv_bfloat16 {
  unsigned short bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_emulation::unpack<float>(static_cast<uint64_t>(x.bits) << 16);
}
inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(fraction), -24);
  return sign * std::ldexp(static_cast<float>(fraction + 1024), exponent - 25);
}

// lg2.approx.ftz.f32 as badly as its specification allows: off by up to 2 ulp, between 1/2 and 2 by up
// to 2^-22.
inline float emulated_log2_approx(float x) {
  if (!(x > 0.0f)) return x == 0.0f ? -INFINITY : NAN;
  if (x < 1.17549435e-38f) return -INFINITY;
  if (x > 3.4e38f) return x;
  const double exact = std::log2(static_cast<double>(x));
  const float nearest = static_cast<float>(exact);
  const double ulp = static_cast<double>(std::nextafterf(std::fabs(nearest), INFINITY)) -
                     std::fabs(static_cast<double>(nearest));
  const bool central = x >= 0.5f && x <= 2.0f;
  const double most = central ? 0x1p-22 - ulp : 1.5 * ulp;  // what is left is for the last rounding
  constexpr double kParts[4] = {-1.0, 1.0, 0.0, 0.5};
  return static_cast<float>(exact + most * kParts[cuda_emulation::machine().draw() & 3]);
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_emulation::machine().launch(*config, [&] { kernel(arguments...); });
}
