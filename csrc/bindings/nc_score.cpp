// genkl_ext::nc_score on tensors. Compiled for the CPU library and, with GENKL_WITH_CUDA, for the
// CUDA library, against torch's stable ABI: one binary serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <tuple>
#include <vector>

#include "common.h"

#if defined(GENKL_WITH_CUDA)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace genkl {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Double:
      return DType::kFloat64;
    default:
      break;
  }
  STD_TORCH_CHECK(false, "nc_score: predictions must be float32, float16, bfloat16 or float64");
}

Predictions describe(const std::vector<Tensor>& models, bool logits) {
  STD_TORCH_CHECK(!models.empty() && models.size() <= kMaxModels,
                  "nc_score: predictions must be 1 to ", kMaxModels, " tensors, got ",
                  models.size());
  Predictions p{};
  p.models = static_cast<int32_t>(models.size());
  p.dtype = dtype_of(models[0]);
  p.logits = logits;
  for (size_t i = 0; i < models.size(); ++i) {
    const Tensor& t = models[i];
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) >= 2 && t.size(1) < (int64_t{1} << 31),
                    "nc_score: predictions must be (N, k) with k >= 2");
    STD_TORCH_CHECK(t.size(0) == models[0].size(0) && t.size(1) == models[0].size(1) &&
                        dtype_of(t) == p.dtype &&
                        t.get_device_index() == models[0].get_device_index(),
                    "nc_score: predictions must agree in shape, dtype and device");
    p.data[i] = t.const_data_ptr();
    p.row_stride[i] = t.stride(0);
    p.class_stride[i] = t.stride(1);
  }
  p.classes = static_cast<int32_t>(models[0].size(1));
  return p;
}

void check_held(const Tensor& vectors, const Tensor& entropies, const Tensor& predictions,
                double tau) {
  STD_TORCH_CHECK(vectors.scalar_type() == ScalarType::Double && vectors.dim() == 2 &&
                      vectors.size(0) >= 1 && vectors.size(1) == predictions.size(1) &&
                      vectors.is_contiguous(),
                  "nc_score: vectors must be contiguous float64 (m, ", predictions.size(1), ")");
  STD_TORCH_CHECK(entropies.scalar_type() == ScalarType::Double && entropies.dim() == 1 &&
                      entropies.size(0) == vectors.size(0) && entropies.is_contiguous(),
                  "nc_score: entropies must be contiguous float64 (", vectors.size(0), ",)");
  STD_TORCH_CHECK(vectors.get_device_index() == predictions.get_device_index() &&
                      entropies.get_device_index() == predictions.get_device_index(),
                  "nc_score: vectors and entropies must be on the device of predictions");
  STD_TORCH_CHECK(tau > 0.0, "nc_score: tau must be above 0, got ", tau);
}

using Outputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Outputs nc_score(std::vector<Tensor> models, Tensor vectors, Tensor entropies, double alpha,
                 double tau, int64_t ballot, bool logits) {
  const Predictions predictions = describe(models, logits);
  const Tensor& like = models[0];
  check_held(vectors, entropies, like, tau);
  const int64_t rows = like.size(0);
  const int count = static_cast<int>(vectors.size(0));
  const auto column = [&](ScalarType type, int64_t length) {
    return torch::stable::new_empty(like, {length}, type);
  };
  Tensor critical_alpha = column(ScalarType::Float, rows);
  Tensor divergence = column(ScalarType::Float, rows);
  Tensor votes = column(ScalarType::Int, rows);
  Tensor top_class = column(ScalarType::Int, rows);
  Tensor top_prob = column(ScalarType::Float, rows);
  Tensor first_bad_row = column(ScalarType::Long, 1);
  const NcOutputs outputs = {
      critical_alpha.mutable_data_ptr<float>(), divergence.mutable_data_ptr<float>(),
      votes.mutable_data_ptr<int32_t>(), top_class.mutable_data_ptr<int32_t>(),
      top_prob.mutable_data_ptr<float>()};
#if defined(GENKL_WITH_CUDA)
  const auto device = like.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const size_t bytes = rule_bytes(predictions.classes, count);
  Tensor memory = column(ScalarType::Byte, static_cast<int64_t>(bytes));
  const NcRule rule = layout_rule(memory.mutable_data_ptr(), predictions, count,
                                  static_cast<int>(ballot), alpha, tau);
  const int error = nc_score_cuda(predictions, rows, rule, vectors.const_data_ptr<double>(),
                                  entropies.const_data_ptr<double>(), outputs,
                                  first_bad_row.mutable_data_ptr<int64_t>(), stream);
  STD_TORCH_CHECK(error == 0, "nc_score: CUDA error ", error, " at launch");
#else
  const NcKernel* kernel = nc_kernel("");
  STD_TORCH_CHECK(kernel, "nc_score: GENKL_SIMD names no kernel of this processor");
  const HostRule held(predictions, vectors.const_data_ptr<double>(),
                      entropies.const_data_ptr<double>(), count, static_cast<int>(ballot), alpha,
                      tau);
  std::atomic<int64_t> first_bad{-1};
  torch::stable::parallel_for(0, rows, task_rows(predictions), [&](int64_t begin, int64_t end) {
    const AlignedMemory scratch = allocate_scratch(*kernel, held.rule);
    score_rows(*kernel, predictions, held.rule, begin, end, scratch.get(), outputs, first_bad);
  });
  *first_bad_row.mutable_data_ptr<int64_t>() = first_bad;
#endif
  return {critical_alpha, divergence, votes, top_class, top_prob, first_bad_row};
}

}  // namespace
}  // namespace genkl

#if defined(GENKL_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(genkl_ext, CUDA, m) { m.impl("nc_score", TORCH_BOX(&genkl::nc_score)); }
#else
STABLE_TORCH_LIBRARY_IMPL(genkl_ext, CPU, m) { m.impl("nc_score", TORCH_BOX(&genkl::nc_score)); }
#endif
