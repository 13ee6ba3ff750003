// Asynchronous copies into shared memory, see copy_async in on_cpu.cc.
#pragma once
#include "on_cpu.h"

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  bool is_aligned = reinterpret_cast<uintptr_t>(to) % bytes == 0 && reinterpret_cast<uintptr_t>(from) % bytes == 0;
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !is_aligned) on_cpu::fail("cp.async: size %zu or alignment", bytes);
  on_cpu::copy_async(to, from, static_cast<int>(bytes), static_cast<int>(zeros));
}
inline void __pipeline_commit() { on_cpu::commit_copies(); }
inline void __pipeline_wait_prior(int pending) { on_cpu::wait_for_copies(pending); }
