// on_cpu.cc - fibers, barriers, warp collectives, counters.  See include/on_cpu.h.
#include "on_cpu.h"
#include <dlfcn.h>
#include <cstdarg>
#include <memory>
#include <unordered_map>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define ON_CPU_ASAN 1
#else
#define ON_CPU_ASAN 0
#endif
#ifndef ON_CPU_COUNT
#define ON_CPU_COUNT 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace on_cpu {
Options& options() {
  static Options o;
  return o;
}
std::map<std::string, Counters>& counters() {
  static std::map<std::string, Counters> c;
  return c;
}
Fiber* cur;
dim3 g_grid, g_block;
static std::string failure;
static void to_main(bool dying);
void fail(const char* fmt, ...) {
  char text[512];
  va_list a;
  va_start(a, fmt);
  vsnprintf(text, sizeof text, fmt, a);
  va_end(a);
  failure = text;
  if (!cur) throw std::runtime_error(failure);
  failure += "  [block " + std::to_string(cur->bid.x) + " thread " + std::to_string(cur->linear) + "]";
  to_main(false);
  abort();  // never resumed
}
enum { READY, BAR, COLL, DONE };
struct Block {
  std::vector<Fiber*> f;
  std::vector<int> ready;
  int live = 0, atbar = 0, red[3] = {0, 1, 0}, redout[3];
  char* dyn = nullptr;
  std::vector<std::pair<const void*, void*>> statics;
  size_t static_bytes = 0;
};
static Block* blk;
static Counters* C;
static const std::function<void()>* body;
static uint64_t rng;
static uint32_t rnd(uint32_t n) {
  rng ^= rng << 13;
  rng ^= rng >> 7;
  rng ^= rng << 17;
  return (uint32_t)((rng >> 32) * n >> 32);
}

// ---- context switch
#if defined(__x86_64__)
static void* main_sp;
asm(".text\n.globl on_cpu_switch\n.type on_cpu_switch,@function\non_cpu_switch:\n"
    "push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp,(%rdi); mov %rsi,%rsp\n"
    "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret\n.size on_cpu_switch,.-on_cpu_switch\n");
extern "C" void on_cpu_switch(void** save, void* load);
#else
static ucontext_t main_uc;
#endif
#if ON_CPU_ASAN
static void* main_fake;
static const void* main_bottom;
static size_t main_size;
#endif
static void fiber_main();
static void to_main(bool dying) {
  Fiber* me = cur;
  (void)me;
  (void)dying;
#if ON_CPU_ASAN
  __sanitizer_start_switch_fiber(dying ? nullptr : &me->asan, main_bottom, main_size);
#endif
#if defined(__x86_64__)
  on_cpu_switch(&me->sp, main_sp);
#else
  swapcontext((ucontext_t*)me->sp, &main_uc);
#endif
#if ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(me->asan, &main_bottom, &main_size);
#endif
}
static void to_fiber(Fiber* f) {
  cur = f;
  ++C->switches;
#if ON_CPU_ASAN
  __sanitizer_start_switch_fiber(&main_fake, f->stack, options().stack);
#endif
#if defined(__x86_64__)
  on_cpu_switch(&main_sp, f->sp);
#else
  swapcontext(&main_uc, (ucontext_t*)f->sp);
#endif
#if ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(main_fake, nullptr, nullptr);
#endif
  cur = nullptr;
}
static void fiber_main() {
#if ON_CPU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
#endif
  (*body)();
  if (!cur->open.empty() || !cur->groups.empty()) {
    cp_commit();
    cp_wait(0);
  }
  cur->state = DONE;
  to_main(true);
  abort();
}
static struct Pool : std::vector<char*> {
  ~Pool() {
    for (auto* p : *this) free(p);
  }
} pool;
static void make(Fiber* f) {
  if (pool.empty())
    f->stack = (char*)aligned_alloc(64, options().stack);
  else {
    f->stack = pool.back();
    pool.pop_back();
  }
#if ON_CPU_ASAN
  ASAN_UNPOISON_MEMORY_REGION(f->stack, options().stack);
#endif
#if defined(__x86_64__)
  void** s = (void**)(f->stack + options().stack) - 1;
  *s = nullptr;
  *--s = (void*)fiber_main;
  for (int i = 0; i < 6; ++i) *--s = nullptr;
  f->sp = s;
#else
  auto* u = new ucontext_t;
  getcontext(u);
  u->uc_stack.ss_sp = f->stack;
  u->uc_stack.ss_size = options().stack;
  makecontext(u, fiber_main, 0);
  f->sp = u;
#endif
}
static void wake(Fiber* f) {
  f->state = READY;
  f->block->ready.push_back((int)f->linear);
}
static void wait(int st) {
  cur->state = st;
  to_main(false);
  asm volatile("" ::: "memory");
}

// ---- barriers
static void release_bar(Block* b) {
  b->atbar = 0;
  for (int i = 0; i < 3; ++i) b->redout[i] = b->red[i];
  b->red[0] = 0;
  b->red[1] = 1;
  b->red[2] = 0;
  ++C->barriers;
  for (auto* f : b->f)
    if (f->state == BAR) wake(f);
}
void barrier(const char* w) {
  cur->where = w;
  ++cur->block->atbar;
  if (cur->block->atbar == cur->block->live) {
    cur->state = BAR;
    release_bar(cur->block);
    cur->state = READY;
    to_main(false);
  } else
    wait(BAR);
  asm volatile("" ::: "memory");
}
int barrier_reduce(int op, int v) {
  Block* b = cur->block;
  b->red[0] += v != 0;
  b->red[1] &= v != 0;
  b->red[2] |= v != 0;
  barrier("__syncthreads_op");
  return b->redout[op];
}
void maybe_yield() {
  ++C->atomics;
  if (options().preempt && cur) {
    wake(cur);
    to_main(false);
  }
}
void* dyn_shared() { return cur->block->dyn; }
void* static_shared(const void* site, size_t bytes) {
  for (auto& p : cur->block->statics)
    if (p.first == site) return p.second;
  void* p;
  if (posix_memalign(&p, 128, bytes)) abort();
  memset(p, options().poison ? 0xFF : 0, bytes);
  cur->block->statics.push_back({site, p});
  cur->block->static_bytes += bytes;
  return p;
}
std::map<const void*, int>& dynamic_shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}
std::vector<Launch>& launches() {
  static std::vector<Launch> l;
  return l;
}

// ---- warp collectives: the last lane of the mask to arrive computes every lane's result, then all are released
void collective(uint32_t mask, const char* what, const void* in, void* out, Combine fn) {
  Fiber* me = cur;
  Block* b = me->block;
  if (!(mask >> me->lane & 1)) fail("%s: lane %d is not in its own mask %08x", what, me->lane, mask);
  me->where = what;
  me->mask = mask;
  me->in = in;
  me->out = out;
  me->state = COLL;
  unsigned base = me->linear - (unsigned)me->lane;
  const void* ins[32];
  void* outs[32];
  bool all = true;
  for (int l = 0; l < 32 && all; ++l)
    if (mask >> l & 1) {
      if (base + l >= b->f.size() || b->f[base + l]->state == DONE) {
        if (base + l >= b->f.size()) {
          mask &= ~(1u << l);
          continue;
        }
        fail("%s: lane %d of the mask has exited", what, l);
      }
      Fiber* f = b->f[base + l];
      if (f->state != COLL)
        all = false;
      else if ((f->mask != me->mask || strcmp(f->where, what)) && !(f->mask >> me->lane & 1))
        all = false;  // in a smaller group that is still waiting
      else if (f->mask != me->mask || strcmp(f->where, what))
        fail("%s(mask %08x) meets %s(mask %08x) of lane %d", what, me->mask, f->where, f->mask, l);
      ins[l] = f->in;
      outs[l] = f->out;
    }
  if (!all) {
    to_main(false);
    asm volatile("" ::: "memory");
    return;
  }
  ++C->collectives;
  fn(mask, ins, outs);
  for (int l = 0; l < 32; ++l)
    if ((mask >> l & 1) && b->f[base + l] != me) wake(b->f[base + l]);
  me->state = READY;  // and goes on; the others follow in random order
  asm volatile("" ::: "memory");
}

// ---- cp.async
void cp_async(void* d, const void* s, int n, int z) {
  touch(s, n - z, 0, 0xC0FFEE);
  if (options().poison) memset(d, 0xFF, n);
  cur->open.push_back({d, s, n, z});
}
void cp_commit() {
  cur->groups.push_back(std::move(cur->open));
  cur->open.clear();
}
void cp_wait(int n) {
  auto& g = cur->groups;
  size_t k = g.size() > (size_t)n ? g.size() - n : 0;
  for (size_t i = 0; i < k; ++i)
    for (auto& c : g[i]) {
      memcpy(c.d, c.s, c.n - c.zfill);
      memset((char*)c.d + c.n - c.zfill, 0, c.zfill);
    }
  g.erase(g.begin(), g.begin() + k);
}

// ---- traffic: each fiber logs its accesses; at the end of the block the i-th access of the lanes of a warp at one
// source line are joined to a warp-wide access, of which the distinct 32-byte sectors (or bank wavefronts) are counted
void touch(const void* p, size_t n, int kind, uint32_t site) {
  if (kind == 0) {
    C->gld_bytes += n;
  } else if (kind == 1)
    C->gst_bytes += n;
#if ON_CPU_COUNT
  cur->log.push_back({(uintptr_t)p, (uint32_t)n, site, (uint8_t)kind});
#endif
}
static void settle(Block* b) {
#if ON_CPU_COUNT
  struct It {
    uint64_t key;
    uintptr_t a;
    uint32_t n;
  };
  std::vector<It> v;
  std::unordered_map<uint64_t, uint32_t> nth;
  for (size_t w = 0; w < b->f.size(); w += 32) {
    v.clear();
    for (size_t i = w; i < std::min(b->f.size(), w + 32); ++i) {
      nth.clear();
      for (auto& a : b->f[i]->log) {
        uint64_t k = (uint64_t)a.kind << 60 | (uint64_t)a.site << 32;
        v.push_back({k | nth[k]++, a.a, a.n});
      }
    }
    std::sort(v.begin(), v.end(), [](const It& x, const It& y) { return x.key != y.key ? x.key < y.key : x.a < y.a; });
    for (size_t i = 0, j; i < v.size(); i = j) {
      int kind = (int)(v[i].key >> 60);
      uintptr_t last = 0;
      uint64_t sec = 0;
      if (kind < 2) {
        for (j = i; j < v.size() && v[j].key == v[i].key; ++j)
          for (uintptr_t s = v[j].a / 32; s <= (v[j].a + v[j].n - 1) / 32; ++s)
            if (s + 1 > last) {
              ++sec;
              last = s + 1;
            }
        (kind ? C->gst_ops : C->gld_ops)++;
        (kind ? C->gst_sectors : C->gld_sectors) += sec;
      } else {  // 32 banks of 4 bytes: most distinct words on one bank
        std::vector<uintptr_t> words;
        for (j = i; j < v.size() && v[j].key == v[i].key; ++j)
          for (uint32_t q = 0; q < std::max(4u, v[j].n); q += 4) words.push_back((v[j].a + q) / 4);
        std::sort(words.begin(), words.end());
        words.erase(std::unique(words.begin(), words.end()), words.end());
        int bank[32] = {0}, mx = 0;
        for (auto x : words) mx = std::max(mx, ++bank[x & 31]);
        C->sld_ops++;
        C->sld_wavefronts += mx;
      }
    }
  }
#endif
}

// ---- running blocks
static Block* new_block(unsigned bi, size_t dyn) {
  auto* b = new Block;
  unsigned n = g_block.x * g_block.y * g_block.z;
  b->live = (int)n;
  if (dyn) {
    if (posix_memalign((void**)&b->dyn, 128, dyn)) abort();
    memset(b->dyn, options().poison ? 0xFF : 0, dyn);
  }  // exact size: ASan sees overruns
  for (unsigned i = 0; i < n; ++i) {
    auto* f = new Fiber;
    f->linear = i;
    f->lane = i & 31;
    f->warp = i >> 5;
    f->block = b;
    f->tid = {i % g_block.x, i / g_block.x % g_block.y, i / (g_block.x * g_block.y)};
    f->bid = {bi % g_grid.x, bi / g_grid.x % g_grid.y, bi / (g_grid.x * g_grid.y)};
    make(f);
    b->f.push_back(f);
    b->ready.push_back((int)i);
  }
  return b;
}
static void run(Block* b) {  // until every live thread is done or waits for the grid
  blk = b;
  while (!b->ready.empty() && failure.empty()) {
    size_t k = 0, n = b->ready.size();
    if (options().order == 2)
      k = rnd((uint32_t)n);
    else {
      for (size_t i = 1; i < n; ++i)
        if ((b->ready[i] < b->ready[k]) == (options().order == 0)) k = i;
    }
    Fiber* f = b->f[b->ready[k]];
    b->ready[k] = b->ready.back();
    b->ready.pop_back();
    to_fiber(f);
    if (f->state == DONE) {
      pool.push_back(f->stack);
      f->stack = nullptr;
      --b->live;
      if (b->live && b->atbar == b->live) release_bar(b);
    }
  }
  if (failure.empty() && b->live) {
    cur = nullptr;
    failure = "deadlock, " + std::to_string(b->live) + " threads wait:";
    std::map<std::string, int> m;
    for (auto* f : b->f)
      if (f->state != DONE) m[std::string(f->where) + (f->state == BAR ? " (barrier)" : "")]++;
    for (auto& p : m) failure += " " + std::to_string(p.second) + " at " + p.first + ";";
  }
}
static void free_block(Block* b) {
  settle(b);
  for (auto* f : b->f) {
    if (f->stack) pool.push_back(f->stack);
    delete f;
  }
  for (auto& p : b->statics) free(p.second);
  free(b->dyn);
  delete b;
}
void launch(void* kernel, unsigned blocks, int threads, size_t dyn, const void* arguments, size_t argument_bytes,
            const std::function<void()>& fn) {
  launches().push_back({kernel, blocks, threads, dyn, std::string((const char*)arguments, argument_bytes)});
  Dl_info info;
  const char* name = dladdr(kernel, &info) && info.dli_sname ? info.dli_sname : "kernel";
  g_grid = dim3(blocks);
  g_block = dim3(threads);
  body = &fn;
  C = &counters()[name];
  ++C->launches;
  rng = options().seed * 0x9E3779B97F4A7C15ull + 77;
  if (!rng) rng = 1;
  if (threads > 1024 || threads < 1 || !blocks)
    throw std::runtime_error("bad launch: " + std::to_string(blocks) + " blocks of " + std::to_string(threads));
  C->blocks += blocks;
  C->threads += (uint64_t)blocks * threads;
  std::vector<unsigned> ord(blocks);
  for (unsigned i = 0; i < blocks; ++i) ord[i] = options().order == 1 ? blocks - 1 - i : i;
  if (options().order == 2)
    for (unsigned i = blocks; i > 1; --i) std::swap(ord[i - 1], ord[rnd(i)]);
  for (unsigned i : ord) {
    Block* b = new_block(i, dyn);
    run(b);
    cur = nullptr;
    // without the attribute, 48 KB of static and dynamic shared memory together
    auto set = dynamic_shared_limits().find(kernel);
    size_t allowed = set == dynamic_shared_limits().end() ? (48 << 10) - b->static_bytes : set->second;
    if (failure.empty() && (dyn > allowed || dyn + b->static_bytes > options().shared_limit))
      failure = "too much shared memory: " + std::to_string(b->static_bytes) + " + " + std::to_string(dyn);
    free_block(b);
    if (!failure.empty()) {
      std::string text = std::string(name) + ": " + failure;
      failure.clear();
      throw std::runtime_error(text);
    }
  }
}
}  // namespace on_cpu
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr a, int) {
  *value =
      a == cudaDevAttrMultiProcessorCount ? on_cpu::options().multiprocessors : (int)on_cpu::options().shared_limit;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value > static_cast<int>(on_cpu::options().shared_limit)) return cudaErrorInvalidValue;
  int& limit = on_cpu::dynamic_shared_limits()[kernel];
  if (value < limit) throw std::runtime_error("the shared memory that a kernel may have is lowered");
  limit = value;
  return cudaSuccess;
}
