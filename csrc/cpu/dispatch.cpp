// Chooses the instruction set, once: the best that the CPU has, or what PROAC_CPU_ISA asks for.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#if defined(PROAC_X86_KERNELS)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace proac {

namespace {

#if defined(PROAC_X86_KERNELS)
// Conversions of float16, which the __builtin_cpu_supports of Clang 14 has no name for.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}

// AMX for bfloat16 and whole numbers, with AVX-512's conversions to the former. Linux gives a process the registers, 8
// KiB a thread, on request only.
bool has_tile_unit() {
#if defined(__linux__)
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d >> 22 & d >> 24 & d >> 25 & 1) == 0)
    return false;                                                                   // AMX-BF16, -TILE, -INT8
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || (a >> 5 & 1) == 0) return false;  // AVX512-BF16
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

bool runs(const Kernels& kernels) {
#if defined(PROAC_X86_KERNELS)
  if (&kernels == &amx::kernels) return runs(avx512::kernels) && has_tile_unit();
  if (&kernels == &avx512::kernels) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && runs(avx2::kernels);
  }
  if (&kernels == &avx2::kernels) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  }
#endif
  return &kernels == &baseline::kernels;
}

const Kernels* choose() {
  const Kernels* known[] = {
#if defined(PROAC_X86_KERNELS)
      &amx::kernels,
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
                           "\"; expected one of baseline, avx2, avx512, amx, as far as the CPU goes, or unset it");
}

}  // namespace

const Kernels& cpu_kernels() {
  static const Kernels* chosen = choose();
  return *chosen;
}

}  // namespace proac
