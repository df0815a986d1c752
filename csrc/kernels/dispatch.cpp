// What the CPU walks share and need only once: the layout of a rule, and which walk this processor
// runs.
#include <cfloat>
#include <cstdlib>
#include <cstring>

#include "nc_score.h"
#include "scratch.h"

namespace genkl {

#if defined(__x86_64__)
extern const NcKernel kNcKernelAvx512, kNcKernelAvx2;
#endif
extern const NcKernel kNcKernelPortable;

namespace {

const NcKernel* const kBuilt[] = {
#if defined(__x86_64__)
    &kNcKernelAvx512, &kNcKernelAvx2,
#endif
    &kNcKernelPortable, nullptr};

bool runs_here(const NcKernel* kernel) {
#if defined(__x86_64__)
  if (kernel == &kNcKernelAvx512)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
           __builtin_cpu_supports("bmi2");
  if (kernel == &kNcKernelAvx2)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
#endif
  return kernel == &kNcKernelPortable;
}

// Whole lane-vectors of every width, and whole sets of accumulators of the columns walk.
int rule_stride(int vectors) { return round_up(round_up(vectors, 20), 16); }

// The number of `precision` significant bits nearest to x > 0 (ties to even), with exponents from
// `lowest` on; the smallest such number in place of 0.
double round_to(double x, int precision, int lowest) {
  int exponent;
  frexp(x, &exponent);  // x = f 2^exponent, f in [1/2, 1)
  if (exponent < lowest) exponent = lowest;
  const double quantum = ldexp(1.0, exponent - precision);
  const double rounded = nearbyint(x / quantum) * quantum;
  return rounded > 0.0 ? rounded : quantum;
}

}  // namespace

double round_tau(double tau, DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return round_to(tau, 24, -125);
    case DType::kFloat16:
      return round_to(tau, 11, -13);
    case DType::kBFloat16:
      return round_to(tau, 8, -125);
    default:
      return tau;
  }
}

size_t rule_bytes(int classes, int vectors) {
  const size_t k = static_cast<size_t>(classes), m = static_cast<size_t>(vectors);
  const size_t stride = static_cast<size_t>(rule_stride(vectors));
  return 64 + sizeof(float) * stride * (k + 2) + sizeof(double) * m * (k + 1);
}

NcRule layout_rule(void* memory, const Predictions& predictions, int vectors, int ballot,
                   double alpha, double tau) {
  NcRule rule;
  const size_t k = static_cast<size_t>(predictions.classes), m = static_cast<size_t>(vectors);
  const size_t stride = static_cast<size_t>(rule_stride(vectors));
  rule.classes = predictions.classes;
  rule.vectors = vectors;
  rule.ballot = ballot;
  rule.stride = static_cast<int32_t>(stride);
  rule.alpha = alpha;
  rule.tau = round_tau(tau, compared_dtype(predictions));
  const bool coarse = predictions.dtype == DType::kFloat16 || predictions.dtype == DType::kBFloat16;
  rule.tolerance = coarse ? 2e-2 : 1e-3;
  // float32 cannot stand for float64 entries beside tau, nor take logarithms of subnormals.
  rule.exact_only = compared_dtype(predictions) == DType::kFloat64 ||
                    predictions.classes > kMaxFastClasses || rule.tau < FLT_MIN;
  rule.weights = static_cast<float*>(memory);
  rule.entropy = rule.weights + stride * k;
  rule.offset = rule.entropy + stride;
  rule.vectors_exact = reinterpret_cast<double*>(rule.offset + stride);
  rule.entropy_exact = rule.vectors_exact + m * k;
  return rule;
}

void entropies_cpu(const double* vectors, int count, int classes, double* entropies) {
  for (int j = 0; j < count; ++j) {
    double total = 0.0;
    for (int i = 0; i < classes; ++i) {
      const double u = vectors[static_cast<int64_t>(j) * classes + i];
      total = total + u * log2_exact(u);
    }
    entropies[j] = total;
  }
}

const NcKernel* const* nc_kernels_built() { return kBuilt; }

const NcKernel* nc_kernel(const char* name) {
  if (!*name) {
    const char* wanted = getenv("GENKL_SIMD");
    if (wanted) name = wanted;
  }
  for (const NcKernel* const* kernel = kBuilt; *kernel; ++kernel)
    if (runs_here(*kernel) && (!*name || strcmp((*kernel)->name, name) == 0)) return *kernel;
  return nullptr;
}

}  // namespace genkl
