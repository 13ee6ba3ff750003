// Fibers: functions that leave off in the middle and go on later, each on a stack of its own, all on one thread of the CPU.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace on_cpu {

// Where the CPU left off: on x86-64 the stack pointer, with the registers pushed below it.
#if defined(__x86_64__)
using Context = void*;
#else
using Context = ucontext_t;
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  ~Fiber() { free_stack(); }

  // `start` runs at the first enter(). It calls arrive() first, never returns, and ends with leave(true).
  void prepare(void (*start)());
  void arrive();

  // From outside to the fiber; returns when it leaves.
  void enter();
  // From the fiber to outside; returns at the next enter(), or never.
  void leave(bool for_good = false);

  // For a fiber that has left for good, or will not be entered again.
  void free_stack();

 private:
  Context context_{};
  char* stack_ = nullptr;
  void* sanitizer_stack_ = nullptr;
};

}  // namespace on_cpu
