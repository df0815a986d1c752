// Which walk of row_statistics this processor runs.
#include <cstring>

#include "nc_score.h"
#include "row_statistics.h"

namespace genkl {

#if defined(__x86_64__)
extern const RowStatisticsKernel kRowStatisticsKernelAvx512, kRowStatisticsKernelAvx2;
#endif
extern const RowStatisticsKernel kRowStatisticsKernelPortable;

namespace {

const RowStatisticsKernel* const kBuilt[] = {
#if defined(__x86_64__)
    &kRowStatisticsKernelAvx512, &kRowStatisticsKernelAvx2,
#endif
    &kRowStatisticsKernelPortable};

}  // namespace

const RowStatisticsKernel* row_statistics_kernel(const char* name) {
  const NcKernel* chosen = nc_kernel(name);
  if (!chosen) return nullptr;
  for (const RowStatisticsKernel* kernel : kBuilt)
    if (strcmp(kernel->name, chosen->name) == 0) return kernel;
  return nullptr;
}

}  // namespace genkl
