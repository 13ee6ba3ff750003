// Threads, barriers and shared memory of a GPU, on one thread of a CPU.
//
// Blocks run one after another. Every thread of the block that runs is a fiber (fiber.h), which keeps running until it has
// to wait for others (a barrier, or an instruction of its warp) or ends. Then the scheduler, in run(), picks one of the
// threads that are ready: the lowest, the highest, or a random one of a seeded sequence; the order of blocks likewise. A kernel that is right does not notice; an order that it relies on without a barrier shows as a
// wrong result in one of the orders.
//
// Shared memory is allocated for each block at its exact size, so that AddressSanitizer sees an overrun, and starts as NaN.
// An asynchronous copy is done at the wait, the latest moment at which the hardware may do it; until then its target is NaN.
#include "on_cpu.h"

#include <dlfcn.h>

#include <cstdarg>
#include <utility>

#include "fiber.h"

namespace on_cpu {

constexpr size_t kUnaskedLimit = 48 << 10;  // of shared memory, for a kernel without cudaFuncSetAttribute
constexpr size_t kSharedAlignment = 128;
constexpr int kNotANumber = 0xff;  // as every byte of a float

Options& options() {
  static Options options;
  return options;
}
std::vector<Launch>& launches() {
  static std::vector<Launch> launches;
  return launches;
}
std::map<const void*, int>& dynamic_shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

// ---- threads and blocks

struct Copy {
  void* to;
  const void* from;
  int bytes, zeros;
};

enum State { kReady, kAtBarrier, kInWarp, kDone };

struct Block;

struct GpuThread : Thread {
  Fiber fiber;
  unsigned number;  // in the block
  Block* of;
  State state = kReady;
  const char* where = "";  // the place at which it waits

  // While it waits for its warp: what it takes part in.
  uint32_t mask = 0;
  const void* in = nullptr;
  void* out = nullptr;

  // cp.async: groups that are committed, and the copies since.
  std::vector<std::vector<Copy>> groups;
  std::vector<Copy> uncommitted;
};

struct Block {
  std::vector<GpuThread*> threads;
  std::vector<unsigned> ready;  // by number, in no order
  int live = 0, at_barrier = 0;
  char* dynamic = nullptr;
  std::vector<std::pair<const void*, void*>> variables;  // static shared memory
  size_t static_bytes = 0;
};

Thread* current;  // null while the scheduler runs
uint3 block_size, grid_size;

static GpuThread* running() { return static_cast<GpuThread*>(current); }

static const std::function<void()>* body;
static std::string failure;

// Lets others run; returns when the scheduler picks this thread again.
static void to_scheduler() {
  running()->fiber.leave();
  asm volatile("" ::: "memory");  // others have run: nothing of memory may be kept in registers
}

// Where every thread begins.
static void start() {
  GpuThread* self = running();
  self->fiber.arrive();
  (*body)();
  commit_copies();
  wait_for_copies(0);
  self->state = kDone;
  self->fiber.leave(true);
  abort();  // nobody returns to it
}

void fail(const char* format, ...) {
  char text[512];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  failure = text;
  if (!current) throw std::runtime_error(std::exchange(failure, ""));
  GpuThread* self = running();
  failure += "  [block " + std::to_string(self->block.x) + " thread " + std::to_string(self->number) + "]";
  to_scheduler();
  abort();  // the scheduler runs no more threads
}

// ---- barriers

static void make_ready(GpuThread* thread) {
  thread->state = kReady;
  thread->of->ready.push_back(thread->number);
}

static void release_barrier(Block* block) {
  block->at_barrier = 0;
  for (GpuThread* thread : block->threads)
    if (thread->state == kAtBarrier) make_ready(thread);
}

void barrier(const char* what) {
  GpuThread* self = running();
  self->where = what;
  self->state = kAtBarrier;
  if (++self->of->at_barrier == self->of->live) release_barrier(self->of);
  to_scheduler();
}

// ---- instructions of a warp

// Whether `other`, a lane of self's mask, has come to the same instruction.
static bool is_here(const GpuThread* self, const GpuThread* other, int lane) {
  if (other->state == kDone) fail("%s: lane %d of the mask has exited", self->where, lane);
  if (other->state != kInWarp) return false;
  if (other->mask == self->mask && !strcmp(other->where, self->where)) return true;
  if (!has(other->mask, self->lane)) return false;  // in a smaller group that still waits
  fail("%s(mask %08x) meets %s(mask %08x) of lane %d", self->where, self->mask, other->where, other->mask, lane);
}

void collective(uint32_t mask, const char* what, const void* in, void* out, Combine combine) {
  GpuThread* self = running();
  if (!has(mask, self->lane)) fail("%s: lane %d is not in its own mask %08x", what, self->lane, mask);
  self->where = what, self->mask = mask, self->in = in, self->out = out;
  self->state = kInWarp;
  const std::vector<GpuThread*>& threads = self->of->threads;
  size_t first = self->number - self->lane;
  const void* inputs[32];
  void* outputs[32];
  for (int lane = 0; lane < 32; ++lane) {
    if (first + lane >= threads.size()) mask &= ~(1u << lane);  // the last warp has fewer lanes
    if (!has(mask, lane)) continue;
    const GpuThread* other = threads[first + lane];
    if (!is_here(self, other, lane)) {
      to_scheduler();  // the last to arrive does the work
      return;
    }
    inputs[lane] = other->in;
    outputs[lane] = other->out;
  }
  combine(mask, inputs, outputs);
  for (int lane = 0; lane < 32; ++lane)
    if (has(mask, lane) && threads[first + lane] != self) make_ready(threads[first + lane]);
  self->state = kReady;  // and goes on at once; the others follow in any order
  asm volatile("" ::: "memory");
}

// ---- shared memory

static void* allocate_shared(size_t bytes) {
  void* memory;
  if (posix_memalign(&memory, kSharedAlignment, bytes)) abort();
  memset(memory, kNotANumber, bytes);
  return memory;
}

void* dynamic_shared() { return running()->of->dynamic; }

void* static_shared(const void* variable, size_t bytes) {
  Block* block = running()->of;
  for (auto& [known, memory] : block->variables)
    if (known == variable) return memory;
  block->variables.emplace_back(variable, allocate_shared(bytes));
  block->static_bytes += bytes;
  return block->variables.back().second;
}

// ---- asynchronous copies

void copy_async(void* to, const void* from, int bytes, int zeros) {
  memset(to, kNotANumber, bytes);
  running()->uncommitted.push_back({to, from, bytes, zeros});
}

void commit_copies() {
  GpuThread* self = running();
  self->groups.push_back(std::exchange(self->uncommitted, {}));
}

void wait_for_copies(int pending) {
  auto& groups = running()->groups;
  if (groups.size() <= static_cast<size_t>(pending)) return;
  auto end = groups.end() - pending;
  for (auto group = groups.begin(); group != end; ++group)
    for (const Copy& copy : *group) {
      memcpy(copy.to, copy.from, copy.bytes - copy.zeros);
      memset(static_cast<char*>(copy.to) + copy.bytes - copy.zeros, 0, copy.zeros);
    }
  groups.erase(groups.begin(), end);
}

// ---- the scheduler

static uint64_t random_state;

static uint32_t random_below(uint32_t count) {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>((random_state >> 32) * count >> 32);
}

static Block* new_block(unsigned number, size_t dynamic_bytes) {
  Block* block = new Block;
  if (dynamic_bytes) block->dynamic = static_cast<char*>(allocate_shared(dynamic_bytes));
  block->live = static_cast<int>(block_size.x);
  for (unsigned i = 0; i < block_size.x; ++i) {
    GpuThread* thread = new GpuThread;
    thread->index = {i, 0, 0};
    thread->block = {number, 0, 0};
    thread->lane = static_cast<int>(i % 32);
    thread->number = i;
    thread->of = block;
    thread->fiber.prepare(start);
    block->threads.push_back(thread);
    block->ready.push_back(i);
  }
  return block;
}

static void free_block(Block* block) {
  for (GpuThread* thread : block->threads) delete thread;
  for (auto& [variable, memory] : block->variables) free(memory);
  free(block->dynamic);
  delete block;
}

// One of the threads that are ready, in the order asked for.
static GpuThread* take_ready(Block* block) {
  std::vector<unsigned>& ready = block->ready;
  size_t chosen = 0;
  switch (options().order) {
    case kAscending:
      chosen = std::min_element(ready.begin(), ready.end()) - ready.begin();
      break;
    case kDescending:
      chosen = std::max_element(ready.begin(), ready.end()) - ready.begin();
      break;
    default:
      chosen = random_below(static_cast<uint32_t>(ready.size()));
  }
  GpuThread* thread = block->threads[ready[chosen]];
  ready[chosen] = ready.back();
  ready.pop_back();
  return thread;
}

static void report_deadlock(const Block* block) {
  std::map<std::string, int> waiting;
  for (const GpuThread* thread : block->threads)
    if (thread->state != kDone) ++waiting[thread->where + std::string(thread->state == kAtBarrier ? " (barrier)" : "")];
  failure = "deadlock, " + std::to_string(block->live) + " threads wait:";
  for (auto& [where, count] : waiting) failure += " " + std::to_string(count) + " at " + where + ";";
}

// All threads of the block, to their end or the first failure.
static void run(Block* block) {
  while (!block->ready.empty() && failure.empty()) {
    GpuThread* thread = take_ready(block);
    current = thread;
    thread->fiber.enter();
    current = nullptr;
    if (thread->state != kDone) continue;
    thread->fiber.free_stack();
    --block->live;
    if (block->live && block->at_barrier == block->live)
      release_barrier(block);  // it does not wait for threads that ended
  }
  if (failure.empty() && block->live) report_deadlock(block);
}

static std::vector<unsigned> block_order(unsigned blocks) {
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = options().order == kDescending ? blocks - 1 - i : i;
  if (options().order == kRandom)
    for (unsigned i = blocks; i > 1; --i) std::swap(order[i - 1], order[random_below(i)]);
  return order;
}

static void check_shared(const void* kernel, const Block* block, size_t dynamic_bytes) {
  size_t bytes = block->static_bytes + dynamic_bytes;
  auto set = dynamic_shared_limits().find(kernel);
  bool is_set = set != dynamic_shared_limits().end();
  bool allowed = is_set ? dynamic_bytes <= static_cast<size_t>(set->second) : bytes <= kUnaskedLimit;
  if (!allowed || bytes > options().shared_limit)
    failure = "too much shared memory: " + std::to_string(block->static_bytes) + " + " + std::to_string(dynamic_bytes);
}

void launch(void* kernel, unsigned blocks, int threads, size_t shared, const void* arguments, size_t argument_bytes,
            const std::function<void()>& thread_body) {
  launches().push_back({kernel, blocks, threads, shared, {static_cast<const char*>(arguments), argument_bytes}});
  if (threads > 1024 || threads < 1 || !blocks)
    throw std::runtime_error("bad launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads));
  grid_size = {blocks, 1, 1};
  block_size = {static_cast<unsigned>(threads), 1, 1};
  body = &thread_body;
  random_state = options().seed * 0x9E3779B97F4A7C15ull + 77;
  if (!random_state) random_state = 1;
  for (unsigned number : block_order(blocks)) {
    Block* block = new_block(number, shared);
    run(block);
    if (failure.empty()) check_shared(kernel, block, shared);
    free_block(block);
    if (failure.empty()) continue;
    Dl_info info;
    std::string name = dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "kernel";
    throw std::runtime_error(name + ": " + std::exchange(failure, ""));
  }
}

}  // namespace on_cpu

// ---- the runtime's calls that the launchers make

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const on_cpu::Options& options = on_cpu::options();
  bool is_count = attribute == cudaDevAttrMultiProcessorCount;
  *value = is_count ? options.multiprocessors : static_cast<int>(options.shared_limit);
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > static_cast<int>(on_cpu::options().shared_limit)) return cudaErrorInvalidValue;
  int& limit = on_cpu::dynamic_shared_limits()[kernel];
  if (value < limit) throw std::runtime_error("the shared memory that a kernel may have is lowered");
  limit = value;
  return cudaSuccess;
}
