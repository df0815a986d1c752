// genkl_ext._native: scoring of NumPy arrays. Needs no torch, so that workers of a scoring job start
// fast. Arguments are checked by genkl_ext/rule.py; what is checked here is what memory safety needs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "../kernels/row_statistics.h"
#include "common.h"
#include "image.h"

namespace py = pybind11;

namespace genkl {
namespace {

using Vectors = py::array_t<double, py::array::c_style>;

DType dtype_of(const py::array& array) {
  const py::dtype dtype = array.dtype();
  if (dtype.kind() == 'f' && (dtype.byteorder() == '=' || dtype.byteorder() == '|')) {
    switch (dtype.itemsize()) {
      case 2:
        return DType::kFloat16;
      case 4:
        return DType::kFloat32;
      case 8:
        return DType::kFloat64;
      default:
        break;
    }
  }
  throw py::type_error("nc_score: predictions must be float32, float16 or float64, got " +
                       py::str(dtype).cast<std::string>());
}

bool aligned(const py::array& array) {
  return reinterpret_cast<uintptr_t>(array.data()) % static_cast<size_t>(array.itemsize()) == 0;
}

// Strides that are no whole number of entries, and entries off their alignment, are copied away.
py::array addressable(const py::array& array) {
  const py::ssize_t size = array.itemsize();
  const bool whole = array.strides(0) % size == 0 && array.strides(1) % size == 0;
  return whole && aligned(array) ? array : py::array(array.attr("copy")("C"));
}

Predictions describe(std::vector<py::array>& models) {
  if (models.empty() || models.size() > kMaxModels)
    throw py::value_error("nc_score: predictions must be 1 to " + std::to_string(kMaxModels) +
                          " arrays, got " + std::to_string(models.size()));
  Predictions p{};
  p.models = static_cast<int32_t>(models.size());
  p.dtype = dtype_of(models[0]);
  for (size_t i = 0; i < models.size(); ++i) {
    if (models[i].ndim() != 2 || models[i].shape(0) != models[0].shape(0) ||
        models[i].shape(1) != models[0].shape(1) || dtype_of(models[i]) != p.dtype)
      throw py::value_error("nc_score: predictions must be (N, k) arrays of one shape and dtype");
    models[i] = addressable(models[i]);
    p.data[i] = models[i].data();
    p.row_stride[i] = models[i].strides(0) / models[i].itemsize();
    p.class_stride[i] = models[i].strides(1) / models[i].itemsize();
  }
  p.classes = static_cast<int32_t>(models[0].shape(1));
  return p;
}

// Runs rows [0, rows) on up to num_threads threads, which take task after task. Threads are started
// for the call and joined before it returns: nothing is left that a fork() could break.
int64_t score_on_threads(const NcKernel& kernel, const Predictions& predictions, int64_t rows,
                         const NcRule& rule, const NcOutputs& outputs, int num_threads) {
  const int64_t step = task_rows(predictions);
  const int64_t tasks = (rows + step - 1) / step;
  std::atomic<int64_t> next{0}, first_bad_row{-1};
  const auto work = [&](void* scratch) {
    for (int64_t task = next++; task < tasks; task = next++)
      score_rows(kernel, predictions, rule, task * step, std::min(rows, (task + 1) * step), scratch,
                 outputs, first_bad_row);
  };
  std::exception_ptr failure;
  std::vector<AlignedMemory> scratch;
  std::vector<std::thread> threads;
  try {
    scratch.push_back(allocate_scratch(kernel, rule));
    for (int64_t i = 1; i < std::min<int64_t>(num_threads, tasks); ++i) {
      scratch.push_back(allocate_scratch(kernel, rule));
      threads.emplace_back(work, scratch.back().get());
    }
    work(scratch[0].get());
  } catch (...) {
    failure = std::current_exception();
    next = tasks;
  }
  for (std::thread& thread : threads) thread.join();
  if (failure) std::rethrow_exception(failure);
  return first_bad_row;
}

py::tuple nc_score(std::vector<py::array> models, const Vectors& vectors, const Vectors& entropies,
                   double alpha, double tau, int ballot, bool logits, int num_threads,
                   const std::string& simd) {
  Predictions predictions = describe(models);
  predictions.logits = logits;
  if (vectors.ndim() != 2 || vectors.shape(0) < 1 || vectors.shape(1) != predictions.classes ||
      predictions.classes < 2 || entropies.size() != vectors.shape(0))
    throw py::value_error(
        "nc_score: vectors must be (m, k) like predictions (N, k), entropies (m,)");
  if (!(tau > 0.0)) throw py::value_error("nc_score: tau must be above 0");
  const NcKernel* kernel = nc_kernel(simd.c_str());
  if (!kernel)
    throw py::value_error("nc_score: no kernel for " + (simd.empty() ? "GENKL_SIMD" : simd) +
                          " on this processor");
  const py::ssize_t rows = models[0].shape(0);
  py::array_t<float> critical_alpha(rows), divergence(rows), top_prob(rows);
  py::array_t<int32_t> votes(rows), top_class(rows);
  const NcOutputs outputs = {critical_alpha.mutable_data(), divergence.mutable_data(),
                             votes.mutable_data(), top_class.mutable_data(),
                             top_prob.mutable_data()};
  int64_t first_bad_row;
  {
    py::gil_scoped_release release;
    const HostRule held(predictions, vectors.data(), entropies.data(),
                        static_cast<int>(vectors.shape(0)), ballot, alpha, tau);
    first_bad_row =
        score_on_threads(*kernel, predictions, rows, held.rule, outputs, std::max(num_threads, 1));
  }
  return py::make_tuple(critical_alpha, divergence, votes, top_class, top_prob, first_bad_row);
}

py::array_t<double> entropies(const Vectors& vectors) {
  if (vectors.ndim() != 2) throw py::value_error("entropies: vectors must be (m, k)");
  py::array_t<double> result(vectors.shape(0));
  entropies_cpu(vectors.data(), static_cast<int>(vectors.shape(0)),
                static_cast<int>(vectors.shape(1)), result.mutable_data());
  return result;
}

py::array_t<double> row_statistics(const py::array& rows, bool entropy, bool logs, double floor,
                                   const std::string& simd) {
  const DType dtype = dtype_of(rows);
  if (rows.ndim() != 2 || rows.shape(1) < 2 || dtype == DType::kFloat16 ||
      !(rows.flags() & py::array::c_style) || !aligned(rows))
    throw py::value_error("row_statistics: rows must be (n, k) contiguous float32 or float64");
  if (!(floor >= 2.2250738585072014e-308)) throw py::value_error("row_statistics: floor too small");
  const RowStatisticsKernel* kernel = row_statistics_kernel(simd.c_str());
  if (!kernel)
    throw py::value_error("row_statistics: no kernel for " + (simd.empty() ? "GENKL_SIMD" : simd) +
                          " on this processor");
  py::array_t<double> out({static_cast<py::ssize_t>(kRowStatistics), rows.shape(0)});
  RowJob job{};
  job.rows = rows.data();
  job.wide = dtype == DType::kFloat64;
  job.count = rows.shape(0);
  job.classes = static_cast<int32_t>(rows.shape(1));
  job.entropy = entropy;
  job.logs = logs;
  job.floor = floor;
  job.out = out.mutable_data();
  {
    py::gil_scoped_release release;
    kernel->run(job);
  }
  return out;
}

py::dict build_info() {
  py::list built, here;
  for (const NcKernel* const* kernel = nc_kernels_built(); *kernel; ++kernel) {
    built.append((*kernel)->name);
    if (nc_kernel((*kernel)->name)) here.append((*kernel)->name);
  }
  const NcKernel* chosen = nc_kernel("");
  py::dict info;
  info["version"] = GENKL_VERSION;
  info["compiler"] = GENKL_COMPILER;
  info["simd_built"] = built;
  info["simd_supported"] = here;
  info["simd"] = chosen ? chosen->name : "";
  info["cuda_architectures"] = GENKL_CUDA_ARCHITECTURES;
  return info;
}

}  // namespace
}  // namespace genkl

PYBIND11_MODULE(_native, m) {
  m.doc() = "Scoring of NumPy arrays; see genkl_ext/rule.py.";
  m.def("nc_score", &genkl::nc_score, py::arg("models"), py::arg("vectors"), py::arg("entropies"),
        py::arg("alpha"), py::arg("tau"), py::arg("ballot"), py::arg("logits"),
        py::arg("num_threads"), py::arg("simd") = "",
        "Scores (N, k) arrays; returns critical_alpha, divergence, votes, top_class, top_prob and "
        "the first invalid row or -1.");
  m.def("entropies", &genkl::entropies, py::arg("vectors"),
        "sum_i u_ji log2 u_ji of every row, float64.");
  m.def("row_statistics", &genkl::row_statistics, py::arg("rows"), py::arg("entropy"),
        py::arg("logs"), py::arg("floor"), py::arg("simd") = "",
        "(8, n) float64: total, lowest, squares, top, second, top class, sum q log2 q, sum log2 q; "
        "the last two only where they are asked for. See row_statistics.h.");
  m.def("build_info", &genkl::build_info, "What this module was built with and what it chose.");
  genkl::bind_image_functions(m);
}
