// Registration of the compiled kernels. The ops are defined in proac_cuda/stages/ops.py, with their schemas and fakes.
#include <torch/csrc/stable/library.h>

#ifdef PROAC_CUDA_ARCHITECTURES
#include <cuda_runtime_api.h>
#endif

#include <string>

#include "cpu/dispatch.h"
#include "cpu/stages.h"

namespace {

#ifdef PROAC_CUDA_ARCHITECTURES
// CUDA's numbers as people write them: 13.0 for 13000.
std::string version(int number) { return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10); }
#endif

// What was built, as "key=value;key=value": the CPU's instruction set in use; the GPUs that there is code for, the version of the
// CUDA runtime that is linked in, and the newest that the driver here supports (0.0 where there is no driver).
std::string build_info() {
  std::string info = std::string("cpu=") + proac::cpu_kernels().name;
#ifdef PROAC_CUDA_ARCHITECTURES
  int driver = 0;
  if (cudaDriverGetVersion(&driver) != cudaSuccess) driver = 0;
  info += ";cuda=" PROAC_CUDA_ARCHITECTURES ";runtime=" + version(CUDART_VERSION) + ";driver=" + version(driver);
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
