// nc_score: how little each row of predictions conforms to any class (GenKL, arXiv 2307.09810).
//
//     a_j = sum over dominant i of u_ji log2(1/q_i) / H(u_j)      D_j = H(u_j) (a_j - alpha)
//     critical alpha = max_j a_j      divergence = max_j D_j      votes = #{j : D_j >= 0}
//
// q is the row of averaged predictions, u_j the m uniform-like vectors, H entropy in bits; an entry
// is dominant when q_i >= tau in the input's own precision. The definition is
// genkl_ext/reference.py: votes, decision and top class equal it on every row.
//
// A row is scored in float32 and settled in float64 when some a_j comes too close to alpha:
//
//   Let e = 2^-24 and n the number of dominant entries. The weight u_ji / H_j is rounded once (e);
//   the float32 log2 is right to kLog2Error e; a product and a sum are rounded at most once each, a
//   term takes part in at most n sums. For a row with all q_i <= 1 every term is >= 0, so the errors
//   are relative to the sum itself: |computed a_j - a_j| <= ((1+e)^(n+8) - 1) a_j. The roundings of
//   H_j, of alpha H_j and of the two thresholds add 4 e, the float64
//   definition's own error, (k + 32) 2^-53, less than e. Hence for k <= 65536, with
//       guard(n) = 1.01 (n + 16) e,
//   computed a_j > alpha (1 + guard) means D_j >= 0, computed a_j < alpha (1 - guard) means D_j < 0,
//   and what lies between is settled. Rows with an entry above 1, with a sum off 1, with a negative
//   or non-finite entry or without dominant entries, float64 inputs, and more than 65536 classes are
//   always settled.
#pragma once

#include <cstddef>
#include <cstdint>

#include "elementary.h"

namespace genkl {

constexpr int kMaxModels = 64;
constexpr int kMaxFastClasses = 65536;

enum class DType : int { kFloat32, kFloat16, kBFloat16, kFloat64 };

// M arrays of one shape and dtype. Strides count elements.
struct Predictions {
  const void* data[kMaxModels];
  int64_t row_stride[kMaxModels];
  int64_t class_stride[kMaxModels];
  int32_t models;
  int32_t classes;
  DType dtype;
  bool logits;
};

// A single model's probabilities are held against tau in their own precision; averages and softmax
// results are float32.
GENKL_HD DType compared_dtype(const Predictions& p) {
  return p.models > 1 || p.logits ? DType::kFloat32 : p.dtype;
}

// What rows are held against. The arrays lie in one block of rule_bytes() bytes.
struct NcRule {
  int32_t classes;
  int32_t vectors;  // distinct uniform-like vectors
  int32_t ballot;   // votes that each of them stands for (m when sigma = 0 makes all equal)
  int32_t stride;   // floats per class in weights; length of entropy and offset
  bool exact_only;  // settle every row in float64
  double alpha;
  double tau;             // rounded to the compared dtype; above 0
  double tolerance;       // how far from 1 a row may sum
  float* weights;         // [classes, stride]  -u_ji / H_j, 0 beyond the vectors
  float* entropy;         // [stride]  H_j, 0 beyond
  float* offset;          // [stride]  -alpha H_j, the lowest float beyond
  double* vectors_exact;  // [classes, vectors]  u_ji
  double* entropy_exact;  // [vectors]  sum_i u_ji log2 u_ji = -H_j
};

// One entry per row.
struct NcOutputs {
  float* critical_alpha;
  float* divergence;
  int32_t* votes;
  int32_t* top_class;
  float* top_prob;
};

// Relative half-width of the band around alpha in which a row is settled (see the proof above).
GENKL_HD float guard(int dominant) {
  return 1.01f * 5.9604644775390625e-8f * static_cast<float>(dominant + 16);
}

// The nearest float, moved by one step where that would change its side of the threshold.
GENKL_HD float round_on_side(double value, double threshold, bool above) {
  float f = static_cast<float>(value);
  if (above == (static_cast<double>(f) >= threshold) || !(value == value)) return f;
  const int32_t bits = bit_cast<int32_t>(f);
  const bool away_from_zero = above == (f > 0.0f);
  if (f == 0.0f) return above ? 1.401298464324817e-45f : -1.401298464324817e-45f;
  return bit_cast<float>(away_from_zero ? bits + 1 : bits - 1);
}

// D_j and a_j of one row by the definition; cross is S_j = sum over dominant i of u_ji log2 q_i.
GENKL_HD double exact_divergence(const NcRule& rule, int j, double cross) {
  return rule.alpha * rule.entropy_exact[j] - cross;
}
GENKL_HD double exact_ratio(const NcRule& rule, int j, double cross) {
  return cross / rule.entropy_exact[j];
}

// The largest of two numbers, NaN if one is NaN.
GENKL_HD double max_or_nan(double a, double b) { return a > b || a != a ? a : b; }

// Rounds tau to the dtype it is compared in; never to 0, which would let absent classes count.
double round_tau(double tau, DType dtype);

// Bytes of an NcRule's arrays, and the rule with its pointers into `memory` (64-byte aligned, host
// or device) and its scalars set. The arrays are still to be filled, entry by entry.
size_t rule_bytes(int classes, int vectors);
NcRule layout_rule(void* memory, const Predictions& predictions, int vectors, int ballot,
                   double alpha, double tau);

// Fills what belongs to class i and vector slot j, 0 <= j < stride.
GENKL_HD void fill_rule(const NcRule& rule, const double* vectors,  // [vectors, classes]
                        const double* entropies,                    // [vectors]
                        int i, int j) {
  const bool present = j < rule.vectors;
  const double h = present ? -entropies[j] : 0.0;
  const double u = present ? vectors[static_cast<int64_t>(j) * rule.classes + i] : 0.0;
  rule.weights[static_cast<int64_t>(i) * rule.stride + j] =
      present ? static_cast<float>(-u / h) : 0.0f;
  if (present) rule.vectors_exact[static_cast<int64_t>(i) * rule.vectors + j] = u;
  if (i > 0) return;
  rule.entropy[j] = static_cast<float>(h);
  rule.offset[j] = present ? static_cast<float>(-rule.alpha * h) : -3.402823466e38f;
  if (present) rule.entropy_exact[j] = entropies[j];
}

// ---- CPU ---------------------------------------------------------------------------------------

// sum_i u_ji log2 u_ji of every vector, in class order.
void entropies_cpu(const double* vectors, int count, int classes, double* entropies);

// One way to walk the rows, compiled for one instruction set.
struct NcKernel {
  const char* name;
  size_t (*scratch_bytes)(int classes, int vectors);
  // Scores rows [begin, end) and returns the first of them that is no valid prediction, or -1.
  // `scratch` is 64-byte aligned and belongs to the calling thread.
  int64_t (*score)(const Predictions& predictions, const NcRule& rule, int64_t begin, int64_t end,
                   void* scratch, const NcOutputs& outputs);
};

// The kernel named `name` ("avx512", "avx2", "portable"), or for "" the one the environment
// variable GENKL_SIMD names, or the best this processor runs. Null when there is no such kernel.
const NcKernel* nc_kernel(const char* name);

// Kernels this library was built with, best first, ended by null.
const NcKernel* const* nc_kernels_built();

// ---- CUDA --------------------------------------------------------------------------------------

// Fills the rule from vectors and entropies, all on the device, then scores every row, all on the
// stream. first_bad_row (device) receives the first invalid row or -1. Returns the cudaError_t.
int nc_score_cuda(const Predictions& predictions, int64_t rows, const NcRule& rule,
                  const double* vectors, const double* entropies, const NcOutputs& outputs,
                  int64_t* first_bad_row, void* stream);

}  // namespace genkl
