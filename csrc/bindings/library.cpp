// All operators of genkl_ext. The Python names and the shape rules are in genkl_ext/ops.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(genkl_ext, m) {
  // predictions: 1 to 64 tensors [N, k] of one dtype (float32, float16, bfloat16, float64), any
  // strides. vectors float64 [m, k], entropies float64 [m]: contiguous, on the same device. Every
  // vector casts `ballot` votes. Returns critical_alpha, divergence float32 [N], votes, top_class
  // int32 [N], top_prob float32 [N], and first_bad_row int64 [1], -1 when all rows are valid.
  m.def(
      "nc_score(Tensor[] predictions, Tensor vectors, Tensor entropies, float alpha, float tau, "
      "int ballot, bool logits) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
