// Registration of the compiled kernels. The ops are defined in proac_cuda/ops.py, with their schemas and fakes.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"
#include "cpu/stages.h"

namespace {

// What was built, as "key=value;key=value": the CPU's instruction set in use; the GPUs that there is code for.
std::string build_info() {
  std::string info = std::string("cpu=") + proac::cpu_kernels().name;
#ifdef PROAC_CUDA_ARCHITECTURES
  info += ";cuda=" PROAC_CUDA_ARCHITECTURES;
#endif
  return info;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(proac_cuda, m) { m.def("build_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(proac_cuda, CompositeExplicitAutograd, m) { m.impl("build_info", TORCH_BOX(&build_info)); }

STABLE_TORCH_LIBRARY_IMPL(proac_cuda, CPU, m) {
  m.impl("select_negatives", TORCH_BOX(&proac::select_negatives));
  m.impl("class_statistics", TORCH_BOX(&proac::class_statistics));
  m.impl("positive_sums", TORCH_BOX(&proac::positive_sums));
  m.impl("reduce_loss", TORCH_BOX(&proac::reduce_loss));
  m.impl("loss_gradients", TORCH_BOX(&proac::loss_gradients));
}
