// row_statistics: the sums and largest entries of rows of probabilities, from which the row-wise
// identifiers are made (genkl_ext/identifiers), in one read.
//
// In float64 with operations that IEEE-754 fixes to the last bit, log2 that of elementary.h, and sums
// in class order: the results are the same on every machine.
#pragma once

#include <cstdint>

#include "elementary.h"

namespace genkl {

// The rows of `out`. An input row with NaN or infinity has NaN everywhere but in kTotal and kLowest.
enum RowStatistic : int {
  kTotal,     // sum of q_i
  kLowest,    // smallest q_i; of NaN, anything
  kSquares,   // sum of q_i^2
  kTop,       // largest q_i
  kSecond,    // second largest
  kTopClass,  // lowest class of the largest
  kEntropy,   // sum of q_i log2 q_i; entries below 2^-1022 count as 0, negative ones too
  kLogs,      // sum of log2(max(q_i, floor))
  kRowStatistics
};

struct RowJob {
  const void* rows;  // [count, classes] float32, or float64 if `wide`
  bool wide;
  int64_t count;
  int32_t classes;  // at least 2
  bool entropy;     // whether kEntropy is wanted; it is left as it is otherwise
  bool logs;        // whether kLogs is
  double floor;     // a normal number above 0
  double* out;      // [kRowStatistics, count]
};

// One way to walk the rows, compiled for one instruction set.
struct RowStatisticsKernel {
  const char* name;
  void (*run)(const RowJob& job);
};

// The kernel that stands beside nc_kernel(name); null when there is none.
const RowStatisticsKernel* row_statistics_kernel(const char* name);

}  // namespace genkl
