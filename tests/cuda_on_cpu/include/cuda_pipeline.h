// cp.async primitives.  The copy happens at the wait (the latest moment the hardware may do it); until then the target
// is poisoned, so reading before the wait, or refilling a buffer that is still being read, gives NaN.
#pragma once
#include "on_cpu.h"
inline void __pipeline_memcpy_async(void* d, const void* s, size_t n, size_t zfill = 0) {
  if ((n != 4 && n != 8 && n != 16) || (uintptr_t)d % n || (uintptr_t)s % n)
    on_cpu::fail("cp.async: size %zu or alignment", n);
  on_cpu::cp_async(d, s, (int)n, (int)zfill);
}
inline void __pipeline_commit() { on_cpu::cp_commit(); }
inline void __pipeline_wait_prior(int n) { on_cpu::cp_wait(n); }
