// Chooses the instruction set, once: the best that the CPU has, or what PROAC_CPU_ISA asks for.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace proac {

namespace {

bool runs(const Kernels& kernels) {
#if defined(PROAC_X86_KERNELS)
  if (&kernels == &avx512::kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs(avx2::kernels);
  }
  if (&kernels == &avx2::kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  }
#endif
  return &kernels == &baseline::kernels;
}

const Kernels* choose() {
  const Kernels* known[] = {
#if defined(PROAC_X86_KERNELS)
      &avx512::kernels,
      &avx2::kernels,
#endif
      &baseline::kernels,
  };
  const char* wanted = std::getenv("PROAC_CPU_ISA");
  if (!wanted || !*wanted) {
    for (const Kernels* kernels : known) {
      if (runs(*kernels)) return kernels;
    }
  }
  for (const Kernels* kernels : known) {
    if (wanted && std::strcmp(wanted, kernels->name) == 0 && runs(*kernels)) return kernels;
  }
  throw std::runtime_error(std::string("PROAC_CPU_ISA: this build or this CPU has no kernels for \"") + wanted +
                           "\"; expected one of baseline, avx2, avx512, as far as the CPU goes, or unset it");
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace proac
