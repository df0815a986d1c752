// What both bindings need around the CPU kernel: memory, and the cut of the rows into tasks.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "../kernels/nc_score.h"

namespace genkl {

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
using AlignedMemory = std::unique_ptr<void, FreeAligned>;

inline AlignedMemory allocate_aligned(size_t bytes) {
  void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return AlignedMemory(p);
}

// A rule in host memory, ready for use.
struct HostRule {
  AlignedMemory memory;
  NcRule rule;

  HostRule(const Predictions& predictions, const double* vectors, const double* entropies,
           int count, int ballot, double alpha, double tau)
      : memory(allocate_aligned(rule_bytes(predictions.classes, count))),
        rule(layout_rule(memory.get(), predictions, count, ballot, alpha, tau)) {
    for (int i = 0; i < rule.classes; ++i)
      for (int j = 0; j < rule.stride; ++j) fill_rule(rule, vectors, entropies, i, j);
  }
};

// Rows of one task: about a quarter of a million entries, so that starting it costs nothing.
inline int64_t task_rows(const Predictions& predictions) {
  const int64_t entries = int64_t{1} << 18;
  const int64_t rows = entries / (int64_t{predictions.classes} * predictions.models);
  return rows < 64 ? 64 : rows / 64 * 64;
}

// What the calling thread needs beside its rows.
inline AlignedMemory allocate_scratch(const NcKernel& kernel, const NcRule& rule) {
  return allocate_aligned(kernel.scratch_bytes(rule.classes, rule.stride));
}

// Scores rows [begin, end) on the calling thread; first_bad_row becomes the smallest invalid row.
inline void score_rows(const NcKernel& kernel, const Predictions& predictions, const NcRule& rule,
                       int64_t begin, int64_t end, void* scratch, const NcOutputs& outputs,
                       std::atomic<int64_t>& first_bad_row) {
  const int64_t bad = kernel.score(predictions, rule, begin, end, scratch, outputs);
  if (bad < 0) return;
  int64_t seen = first_bad_row.load();
  while ((seen < 0 || bad < seen) && !first_bad_row.compare_exchange_weak(seen, bad)) {
  }
}

}  // namespace genkl
