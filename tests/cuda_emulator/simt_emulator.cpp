// The emulator's runtime. It is compiled without sanitizers' instrumentation;
// SMD2_TSAN is defined if the kernels are instrumented by ThreadSanitizer.
#include "simt_emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(SMD2_TSAN)
extern "C" {
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* tag);
void __tsan_release(void* tag);
}
#endif

namespace smd2 {
namespace emulator {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxShared = 64 * 1024;  // the limit of capability 7.5
constexpr int64_t kMaxBlocks = (int64_t(1) << 31) - 1;
constexpr size_t kStackBytes = 64 * 1024;

enum class State { ready, at_barrier, in_shuffle, done };

// One CUDA thread.
struct Fiber {
  unsigned number = 0;
  dim3 index{};
  State state = State::ready;
  int line = 0;  // source line of the barrier or shuffle where it waits
  unsigned mask = 0, source = 0;
  uint64_t value = 0, result = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context{};
#endif
  void* sanitizer = nullptr;

  unsigned lane() const {
    return number % kWarpSize;
  }
  unsigned warp() const {
    return number / kWarpSize;
  }
};

// The memory that a block runs in. The blocks of a launch use the same, except
// under ThreadSanitizer: there, each block has its own stacks and its own
// barrier, so that nothing orders the accesses of different blocks, as on a
// device.
struct BlockMemory {
  std::unique_ptr<char[]> shared;
  std::vector<char*> stacks;
  std::vector<void*> sanitizers;
  // What ThreadSanitizer synchronizes on at barriers, alternately: a thread
  // that leaves a barrier must not see what others did after it as ordered.
  char barrier_tags[2] = {0, 0};

  BlockMemory() = default;
  BlockMemory(const BlockMemory&) = delete;
  BlockMemory& operator=(const BlockMemory&) = delete;
  ~BlockMemory() {
    for (char* stack : stacks) {
      munmap(stack, kStackBytes);
    }
  }

  // Allocates shared memory of exactly this size, so that AddressSanitizer
  // knows its end.
  void prepare(unsigned threads, size_t shared_bytes) {
    shared.reset(new char[std::max<size_t>(shared_bytes, 1)]);
    std::fill_n(shared.get(), shared_bytes, char(0xff));  // NaN
    while (stacks.size() < threads) {
      void* stack = mmap(
          nullptr,
          kStackBytes,
          PROT_READ | PROT_WRITE,
          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
          -1,
          0);
      if (stack == MAP_FAILED) {
        throw std::runtime_error("emulator: no memory for another stack");
      }
      stacks.push_back(static_cast<char*>(stack));
#if defined(SMD2_TSAN)
      sanitizers.push_back(__tsan_create_fiber(0));
#else
      sanitizers.push_back(nullptr);
#endif
    }
  }
};

struct Block {
  dim3 index{}, size{};
  unsigned threads = 0, running = 0, waiting = 0, barriers = 0;
  BlockMemory* memory = nullptr;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  std::string error;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler{};
#endif
  void* sanitizer = nullptr;
  char start_tag = 0, end_tag = 0;
};

Block block;
Order order = Order::forward;
void (*observer)(const char*) = nullptr;

#if defined(__x86_64__)
// Saves the callee-saved registers on the old stack and continues on the new
// one.
__attribute__((naked, noinline)) void switch_stack(void**, void*) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n"
      "pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp,(%rdi)\n movq %rsi,%rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n"
      "popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

void to_scheduler() {
#if defined(SMD2_TSAN)
  __tsan_switch_to_fiber(block.sanitizer, 1);
#endif
#if defined(__x86_64__)
  switch_stack(&block.current->stack_pointer, block.scheduler);
#else
  swapcontext(&block.current->context, &block.scheduler);
#endif
}

void to_fiber(Fiber* fiber) {
  block.current = fiber;
#if defined(SMD2_TSAN)
  __tsan_switch_to_fiber(fiber->sanitizer, 1);
#endif
#if defined(__x86_64__)
  switch_stack(&block.scheduler, fiber->stack_pointer);
#else
  swapcontext(&block.scheduler, &fiber->context);
#endif
}

// Makes the launch fail; the thread is never resumed.
void fail(const std::string& what) {
  if (block.error.empty()) {
    block.error = what;
  }
  to_scheduler();
}

std::string name_of(const Fiber& fiber) {
  return "block " + std::to_string(block.index.x) + " thread (" +
         std::to_string(fiber.index.x) + ", " + std::to_string(fiber.index.y) +
         ")";
}

void open_barrier() {
  for (Fiber& fiber : block.fibers) {
    if (fiber.state == State::at_barrier) {
      fiber.state = State::ready;
    }
  }
  block.waiting = 0;
  block.barriers++;
}

void thread_main() {
#if defined(SMD2_TSAN)
  __tsan_acquire(&block.start_tag);
#endif
  (*block.body)();
#if defined(SMD2_TSAN)
  __tsan_release(&block.end_tag);
#endif
  block.current->state = State::done;
  block.running--;
  if (block.waiting && block.waiting == block.running) {
    fail(
        "a thread exits while others wait at a barrier: " +
        name_of(*block.current));
  }
  to_scheduler();
}

// Whether all lanes of the mask have reached this shuffle.
bool complete(const Fiber& caller) {
  const std::string where = "shuffle at line " + std::to_string(caller.line);
  for (unsigned lane = 0; lane < kWarpSize; lane++) {
    if (!(caller.mask >> lane & 1)) {
      continue;
    }
    const unsigned number = caller.warp() * kWarpSize + lane;
    if (number >= block.threads || block.fibers[number].state == State::done) {
      fail(
          where + ": its mask names lane " + std::to_string(lane) +
          ", which does not exist or has exited; " + name_of(caller));
    }
    const Fiber& other = block.fibers[number];
    if (other.state != State::in_shuffle) {
      return false;
    }
    if (other.mask != caller.mask || other.line != caller.line) {
      fail(
          where + ": lane " + std::to_string(lane) + " is in the one at line " +
          std::to_string(other.line) + "; " + name_of(caller));
    }
  }
  return true;
}

void start(Fiber* fiber, unsigned number, char* stack) {
  *fiber = Fiber{};
  fiber->number = number;
  fiber->index = {number % block.size.x, number / block.size.x, 0};
#if defined(__x86_64__)
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&thread_main);
  for (int saved = 0; saved < 6; saved++) {
    *--top = nullptr;
  }
  fiber->stack_pointer = top;
#else
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stack;
  fiber->context.uc_stack.ss_size = kStackBytes;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, thread_main, 0);
#endif
  fiber->sanitizer = block.memory->sanitizers[number];
}

// Runs a warp until all its threads wait for others or have ended; returns
// whether any of them ran.
bool run_warp(unsigned warp, const std::vector<unsigned>& lanes) {
  bool moved = false;
  for (bool again = true; again;) {
    again = false;
    for (const unsigned lane : lanes) {
      const unsigned number = warp * kWarpSize + lane;
      if (number < block.threads &&
          block.fibers[number].state == State::ready) {
        again = moved = true;
        to_fiber(&block.fibers[number]);
        if (!block.error.empty()) {
          return false;
        }
      }
    }
  }
  return moved;
}

void run_block(BlockMemory* memory, std::mt19937* random) {
  block.memory = memory;
  block.fibers.resize(block.threads);
  block.running = block.threads;
  block.waiting = 0;
  std::vector<unsigned> warps((block.threads + kWarpSize - 1) / kWarpSize);
  std::vector<unsigned> lanes(kWarpSize);
  std::iota(warps.begin(), warps.end(), 0u);
  std::iota(lanes.begin(), lanes.end(), 0u);
  if (order == Order::reverse) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  } else if (order == Order::random) {
    std::shuffle(warps.begin(), warps.end(), *random);
    std::shuffle(lanes.begin(), lanes.end(), *random);
  }
  for (unsigned i = 0; i < block.threads; i++) {
    start(&block.fibers[i], i, memory->stacks[i]);
  }
#if defined(SMD2_TSAN)
  __tsan_release(&block.start_tag);
#endif
  while (block.running && block.error.empty()) {
    bool moved = false;
    for (const unsigned warp : warps) {
      moved |= run_warp(warp, lanes);
    }
    if (!moved && block.error.empty()) {
      block.error = "deadlock, the first waiting thread:";
      for (const Fiber& fiber : block.fibers) {
        if (fiber.state != State::done) {
          block.error +=
              " " + name_of(fiber) + " at line " + std::to_string(fiber.line);
          break;
        }
      }
    }
  }
  block.current = nullptr;
}

}  // namespace

void set_order(Order wanted) {
  order = wanted;
}

void set_observer(void (*wanted)(const char*)) {
  observer = wanted;
}

const dim3& thread_index() {
  return block.current->index;
}
const dim3& block_index() {
  return block.index;
}
const dim3& block_size() {
  return block.size;
}
void* shared_memory() {
  return block.memory->shared.get();
}
unsigned lane() {
  return block.current->lane();
}

void synchronize_block(int line) {
  Fiber* self = block.current;
  for (const Fiber& other : block.fibers) {
    if (other.state == State::at_barrier && other.line != line) {
      fail(
          "divergent barrier: " + name_of(*self) + " at line " +
          std::to_string(line) + ", " + name_of(other) + " at line " +
          std::to_string(other.line));
    }
  }
  self->line = line;
  self->state = State::at_barrier;
#if defined(SMD2_TSAN)
  char* tag = &block.memory->barrier_tags[block.barriers % 2];
  __tsan_release(tag);
#endif
  block.waiting++;
  if (block.running != block.threads) {
    fail("a barrier after a thread of the block has exited: " + name_of(*self));
  }
  if (block.waiting == block.running) {
    open_barrier();
  }
  to_scheduler();
#if defined(SMD2_TSAN)
  __tsan_acquire(tag);
#endif
}

uint64_t shuffle(unsigned mask, uint64_t value, unsigned source, int line) {
  Fiber* self = block.current;
  self->mask = mask;
  self->value = value;
  self->source = source;
  self->line = line;
  self->state = State::in_shuffle;
  if (!(mask >> self->lane() & 1) || source >= kWarpSize ||
      !(mask >> source & 1)) {
    fail(
        "shuffle at line " + std::to_string(line) +
        ": the caller or its source is not in the mask; " + name_of(*self));
  }
  if (complete(*self)) {
    Fiber* warp = &block.fibers[self->warp() * kWarpSize];
    for (unsigned lane = 0; lane < kWarpSize; lane++) {
      if (mask >> lane & 1) {
        warp[lane].result = warp[warp[lane].source].value;
        warp[lane].state = State::ready;
      }
    }
  } else {
    to_scheduler();
  }
  return self->result;
}

void run(
    const char* name,
    int64_t blocks,
    unsigned threads_x,
    unsigned threads_y,
    size_t shared_bytes,
    const std::function<void()>& thread) {
  const std::string prefix = std::string("emulator: ") + name + ": ";
  block.size = {threads_x, threads_y, 1};
  block.threads = threads_x * threads_y;
  if (block.threads < 1 || block.threads > kMaxThreads) {
    throw std::runtime_error(
        prefix + "a block has 1 to 1024 threads, got " +
        std::to_string(block.threads));
  }
  if (blocks < 1 || blocks > kMaxBlocks) {
    throw std::runtime_error(
        prefix + "a grid has 1 to 2^31 - 1 blocks, got " +
        std::to_string(blocks));
  }
  if (shared_bytes > kMaxShared) {
    throw std::runtime_error(
        prefix + "a block has at most 65536 bytes of shared memory, got " +
        std::to_string(shared_bytes));
  }
  block.body = &thread;
  block.error.clear();
  std::mt19937 random(static_cast<unsigned>(blocks));
  static std::vector<std::unique_ptr<BlockMemory>> memories;
#if defined(SMD2_TSAN)
  block.sanitizer = __tsan_get_current_fiber();
  constexpr bool kShareMemory = false;
#else
  constexpr bool kShareMemory = true;
#endif
  for (int64_t i = 0; i < blocks && block.error.empty(); i++) {
    const size_t number = kShareMemory ? 0 : static_cast<size_t>(i);
    if (memories.size() <= number) {
      memories.emplace_back(new BlockMemory);
    }
    BlockMemory* memory = memories[number].get();
    memory->prepare(block.threads, shared_bytes);
    block.index = {static_cast<unsigned>(i), 0, 0};
    run_block(memory, &random);
  }
#if defined(SMD2_TSAN)
  __tsan_acquire(&block.end_tag);  // as the next launch does
#endif
  if (!block.error.empty()) {
    throw std::runtime_error(prefix + block.error);
  }
  if (observer) {
    observer(name);
  }
}

}  // namespace emulator
}  // namespace smd2
