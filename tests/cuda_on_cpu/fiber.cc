// Switching stacks, see fiber.h.
#include "fiber.h"

#include <cstddef>
#include <cstdlib>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace on_cpu {

constexpr size_t kStackBytes = 64 << 10;

static Context outside;

#if defined(__x86_64__)
// Pushes the registers that a call keeps, leaves the stack pointer at `save`, and pops those of the other side.
extern "C" void on_cpu_switch(void** save, void* next);
asm(R"(
.text
.globl on_cpu_switch
.type on_cpu_switch,@function
on_cpu_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp,(%rdi)
  mov %rsi,%rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size on_cpu_switch,.-on_cpu_switch
)");
static void swap(Context& save, Context& next) { on_cpu_switch(&save, next); }
static void make(Context& context, char* stack, void (*start)()) {
  constexpr int kRegisters = 6;
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // in place of a return address: the stack is aligned as after a call
  *--top = reinterpret_cast<void*>(start);
  for (int i = 0; i < kRegisters; ++i) *--top = nullptr;
  context = top;
}
#else
static void swap(Context& save, Context& next) { swapcontext(&save, &next); }
static void make(Context& context, char* stack, void (*start)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStackBytes;
  makecontext(&context, start, 0);
}
#endif

// Stacks that are free, for the next fibers.
static struct Stacks : std::vector<char*> {
  ~Stacks() {
    for (char* stack : *this) free(stack);
  }
} stacks;

void Fiber::prepare(void (*start)()) {
  if (stacks.empty()) stacks.push_back(static_cast<char*>(aligned_alloc(64, kStackBytes)));
  stack_ = stacks.back();
  stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(stack_, kStackBytes);
#endif
  make(context_, stack_, start);
}

void Fiber::free_stack() {
  if (stack_) stacks.push_back(stack_);
  stack_ = nullptr;
}

// AddressSanitizer is told of each change of the stack: before it, and after it on the other side.
#if defined(__SANITIZE_ADDRESS__)

static void* outside_sanitizer_stack;
static const void* outside_stack;
static size_t outside_stack_bytes;

void Fiber::arrive() { __sanitizer_finish_switch_fiber(sanitizer_stack_, &outside_stack, &outside_stack_bytes); }

void Fiber::enter() {
  __sanitizer_start_switch_fiber(&outside_sanitizer_stack, stack_, kStackBytes);
  swap(outside, context_);
  __sanitizer_finish_switch_fiber(outside_sanitizer_stack, nullptr, nullptr);
}

void Fiber::leave(bool for_good) {
  __sanitizer_start_switch_fiber(for_good ? nullptr : &sanitizer_stack_, outside_stack, outside_stack_bytes);
  swap(context_, outside);
  arrive();
}

#else

void Fiber::arrive() {}
void Fiber::enter() { swap(outside, context_); }
void Fiber::leave(bool) { swap(context_, outside); }

#endif

}  // namespace on_cpu
