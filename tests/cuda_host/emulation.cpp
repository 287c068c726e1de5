// The scheduler of the emulation: a fiber for each thread, run in turn on one operating system
// thread, and the arithmetic of the matrix instruction. Compiled without sanitizers itself; the
// kernels are compiled with them.
#include "cuda_host/emulation.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#ifdef LMENGINE_ASAN
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef LMENGINE_TSAN
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_write_range(void* address, unsigned long bytes);
#endif

// void lmengine_switch_stack(void** save, void* load): saves the registers that a call preserves
// and the stack pointer, and goes on where `load` was saved.
extern "C" void lmengine_switch_stack(void** save, void* load);
asm(R"(
.text
.globl lmengine_switch_stack
.hidden lmengine_switch_stack
.type lmengine_switch_stack, @function
lmengine_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size lmengine_switch_stack, .-lmengine_switch_stack
)");

namespace lmengine::emulation {
namespace {

constexpr size_t kStackBytes = 256 * 1024, kGuardBytes = 4096;
constexpr int kIdlePasses =
    10000;  // of nothing but spinning threads, before that counts as a deadlock

enum class State { ready, spinning, at_barrier, in_warp, exited };

struct Copy {
  void* destination;
  unsigned char bytes[16];
};

// A thread's copies under way, oldest first. Plain memory: ThreadSanitizer watches the heap.
struct Queue {
  static constexpr int kCopies = 4096;
  Copy copies[kCopies];
  int group_of[kCopies];
  int count;
  int open_group;
};

struct Block;

struct Fiber {
  void* stack_pointer = nullptr;
  void* fake_stack = nullptr;  // ASan's
  void* tsan = nullptr;        // TSan's idea of this thread
  unsigned char* stack = nullptr;
  Block* block = nullptr;
  uint3 thread;
  int index = 0;
  State state = State::ready;
  const char* instruction = nullptr;
  unsigned mask = 0;
  void* argument = nullptr;
  Location where;
  Queue* queue = nullptr;
};

struct Block {
  uint3 index;
  std::vector<Fiber> fibers;
  unsigned char* shared = nullptr;
  int at_barrier = 0;  // threads that wait there
  Location barrier;
  int use = 0;  // how many blocks had this memory before
  char used[2];
};

// What orders memory accesses, said to ThreadSanitizer: what was done before release(x) comes
// before what is done after acquire(x). Nothing else orders them, so two threads' accesses between
// barriers are a race.
}  // namespace
#ifdef LMENGINE_TSAN
void release(void* order) { __tsan_release(order); }
void acquire(void* order) { __tsan_acquire(order); }
#else
void release(void*) {}
void acquire(void*) {}
#endif
namespace {
char start_order, end_order, fence_order;
void* scheduler_tsan = nullptr;

const std::function<void()>* thread_body = nullptr;
Fiber* current = nullptr;
void* scheduler_stack_pointer = nullptr;
size_t shared_size = 0;
#ifdef LMENGINE_ASAN
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
#endif

std::string name_of(const Fiber& fiber) {
  const auto triple = [](uint3 i) {
    return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) +
           ")";
  };
  return "block " + triple(fiber.block->index) + " thread " + triple(fiber.thread);
}

std::string place(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

// Goes back to the scheduler; returns when this fiber's turn comes again.
void suspend(State state) {
  Fiber& fiber = *current;
  fiber.state = state;
#ifdef LMENGINE_ASAN
  __sanitizer_start_switch_fiber(state == State::exited ? nullptr : &fiber.fake_stack,
                                 scheduler_stack, scheduler_stack_bytes);
#endif
#ifdef LMENGINE_TSAN
  __tsan_switch_to_fiber(scheduler_tsan, __tsan_switch_to_fiber_no_sync);
#endif
  lmengine_switch_stack(&fiber.stack_pointer, scheduler_stack_pointer);
#ifdef LMENGINE_ASAN
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
#endif
}

void fiber_main() {
#ifdef LMENGINE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_bytes);
#endif
  acquire(&start_order);
  Block& block = *current->block;
  acquire(&block.used[(block.use + 1) % 2]);  // by the block before that had this memory
  (*thread_body)();
  release(&block.used[block.use % 2]);
  release(&end_order);
  suspend(State::exited);
  std::abort();
}

void resume(Fiber& fiber) {
  current = &fiber;
  fiber.state = State::ready;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
#ifdef LMENGINE_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack, kStackBytes);
#endif
#ifdef LMENGINE_TSAN
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
  lmengine_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer);
#ifdef LMENGINE_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

// A thread's stack, its copies and ThreadSanitizer's idea of it; kept for the next block and never
// given back.
struct Slot {
  unsigned char* stack = nullptr;
  Queue* queue = nullptr;
  void* tsan = nullptr;
};

Slot slot_number(size_t number) {
  static std::vector<Slot> slots;
  while (slots.size() <= number) {
    Slot slot;
    void* memory = mmap(nullptr, kGuardBytes + kStackBytes + sizeof(Queue), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE))
      fail("no memory for the threads' stacks");
    slot.stack = static_cast<unsigned char*>(memory) + kGuardBytes;
    slot.queue = reinterpret_cast<Queue*>(slot.stack + kStackBytes);
#ifdef LMENGINE_TSAN
    slot.tsan = __tsan_create_fiber(0);
#endif
    slots.push_back(slot);
  }
  return slots[number];
}

void prepare(Fiber& fiber, const Slot& slot) {
  fiber.stack = slot.stack;
  fiber.tsan = slot.tsan;
  // as lmengine_switch_stack leaves it: six registers, the return address, and one word so that at
  // fiber_main's entry the stack pointer is 8 past a multiple of 16, as after a call
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
  for (int i = 0; i < 8; ++i) top[i] = nullptr;
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top;
  slot.queue->count = slot.queue->open_group = 0;
  fiber.queue = slot.queue;
}

void fill(Block& block, uint3 index, size_t first_slot) {
  block.index = index;
  ++block.use;
  // NaN in every floating-point type; volatile, so that it is no call that ThreadSanitizer sees
  for (size_t i = 0; i < shared_size; ++i)
    const_cast<volatile unsigned char*>(block.shared)[i] = 0xff;
  block.at_barrier = 0;
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  block.fibers.assign(threads, Fiber());
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.index = static_cast<int>(i);
    fiber.thread = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    prepare(fiber, slot_number(first_slot + i));
  }
  if (on_block_start) on_block_start(block.shared, shared_size, static_cast<int>(threads));
}

[[noreturn]] void deadlock(const std::vector<Block>& blocks) {
  std::string message = "no thread can go on:";
  int lines = 0;
  for (const Block& block : blocks) {
    std::string previous;
    for (const Fiber& fiber : block.fibers) {
      std::string what;
      if (fiber.state == State::exited) what = "has returned";
      if (fiber.state == State::spinning) what = "waits in a loop";
      if (fiber.state == State::at_barrier) what = "waits at __syncthreads, " + place(fiber.where);
      if (fiber.state == State::in_warp) {
        char mask[16];
        std::snprintf(mask, sizeof mask, "%08x", fiber.mask);
        what = std::string("waits at ") + fiber.instruction + " with mask " + mask + ", " +
               place(fiber.where);
      }
      if (what != previous && ++lines <= 16) message += "\n  " + name_of(fiber) + " and on " + what;
      previous = what;
    }
  }
  fail(message);
}

bool reversed() {
  const char* order = std::getenv("LMENGINE_EMULATION_ORDER");
  if (!order || std::string(order) == "forward") return false;
  if (std::string(order) != "reverse")
    fail("LMENGINE_EMULATION_ORDER: expected forward or reverse");
  return true;
}

// Runs all threads of the blocks to their end.
void run_blocks(std::vector<Block>& blocks) {
  const bool backwards = reversed();
  size_t left = 0;
  for (const Block& block : blocks) left += block.fibers.size();
  for (int idle = 0; left;) {
    bool ran = false, worked = false;
    for (size_t b = 0; b < blocks.size(); ++b) {
      Block& block = blocks[backwards ? blocks.size() - 1 - b : b];
      for (size_t i = 0; i < block.fibers.size(); ++i) {
        Fiber& fiber = block.fibers[backwards ? block.fibers.size() - 1 - i : i];
        if (fiber.state != State::ready && fiber.state != State::spinning) continue;
        resume(fiber);
        ran = true;
        worked = worked || fiber.state != State::spinning;
        left -= fiber.state == State::exited;
      }
    }
    if (!worked && on_idle) worked = on_idle();
    idle = worked ? 0 : idle + 1;
    if ((!ran && !worked) || idle > kIdlePasses) deadlock(blocks);
  }
  if (on_blocks_end) on_blocks_end();
}

}  // namespace

[[noreturn]] void fail(const std::string& message, const Location* where) {
  std::fflush(stdout);
  std::fprintf(stderr, "CUDA emulation: %s", message.c_str());
  if (where) std::fprintf(stderr, ", %s", place(*where).c_str());
  if (current) std::fprintf(stderr, " (%s)", name_of(*current).c_str());
  std::fprintf(stderr, "\n");
  std::_Exit(70);
}

void sync_threads(const Location& where) {
  Block& block = *current->block;
  if (block.at_barrier && (block.barrier.line() != where.line() ||
                           std::strcmp(block.barrier.file_name(), where.file_name()))) {
    fail("divergent __syncthreads: other threads of the block wait at " + place(block.barrier),
         &where);
  }
  block.barrier = where;
  release(&block.barrier);
  current->where = where;
  if (++block.at_barrier == static_cast<int>(block.fibers.size())) {
    block.at_barrier = 0;
    for (Fiber& other : block.fibers) other.state = State::ready;
  } else {
    suspend(State::at_barrier);
  }
  acquire(&block.barrier);
}

void warp_instruction(const char* name, unsigned mask, void* argument, Complete complete,
                      const Location& where) {
  Block& block = *current->block;
  const int own_lane = current->index % 32, first = current->index - own_lane;
  const int lanes = std::min(32, static_cast<int>(block.fibers.size()) - first);
  if (!(mask >> own_lane & 1))
    fail(std::string(name) + ": the calling lane is not in the mask", &where);
  current->instruction = name;
  current->mask = mask;
  current->argument = argument;
  current->where = where;
  bool all_here = true;
  for (int i = 0; i < lanes; ++i) {
    const Fiber& other = block.fibers[first + i];
    if (i == own_lane || !(mask >> i & 1)) continue;
    if (other.state != State::in_warp || other.mask != mask) {
      all_here = false;
    } else if (std::strcmp(other.instruction, name)) {
      fail(std::string("divergent warp: ") + name + ", but " + name_of(other) + " is at " +
               other.instruction + ", " + place(other.where),
           &where);
    }
  }
  const bool orders_memory = complete == nullptr;  // a __syncwarp; shuffles promise nothing
  if (orders_memory) release(&block.fibers[first]);
  if (!all_here) {
    suspend(State::in_warp);
    if (orders_memory) acquire(&block.fibers[first]);
    return;
  }
  if (orders_memory) acquire(&block.fibers[first]);
  void* arguments[32] = {};
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    arguments[i] = block.fibers[first + i].argument;
    block.fibers[first + i].state = State::ready;
  }
  if (complete) complete(arguments);
}

void thread_fence() {
  release(&fence_order);
  acquire(&fence_order);
}

void spin() { suspend(State::spinning); }

unsigned char* shared_memory() { return current->block->shared; }

int thread_index() { return current->index; }

void check_shared(const void* address, size_t bytes, const char* name, const Location& where) {
  const unsigned char* begin = current->block->shared;
  const unsigned char* wanted = static_cast<const unsigned char*>(address);
  if (wanted < begin || wanted + bytes > begin + shared_size) {
    fail(std::string(name) + ": address outside the block's " + std::to_string(shared_size) +
             " bytes of shared memory, at offset " + std::to_string(wanted - begin),
         &where);
  }
}

void copy_later(void* shared, const unsigned char (&bytes)[16]) {
  Queue& queue = *current->queue;
  if (queue.count == Queue::kCopies) fail("cp_async_16: too many copies under way");
  queue.copies[queue.count].destination = shared;
  std::memcpy(queue.copies[queue.count].bytes, bytes, 16);
  queue.group_of[queue.count++] = queue.open_group;
}

void close_group() { ++current->queue->open_group; }

void wait_groups(int pending) {
  Queue& queue = *current->queue;
  int kept = 0;
  for (int i = 0; i < queue.count; ++i) {
    if (queue.group_of[i] < queue.open_group - pending) {
      std::memcpy(queue.copies[i].destination, queue.copies[i].bytes, 16);
#ifdef LMENGINE_TSAN
      __tsan_write_range(queue.copies[i].destination, 16);
#endif
    } else {
      queue.copies[kept] = queue.copies[i];
      queue.group_of[kept++] = queue.group_of[i];
    }
  }
  queue.count = kept;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, bool cooperative,
              const std::function<void()>& thread) {
  if (current) fail("a kernel cannot launch another");
  const size_t threads = static_cast<size_t>(block.x) * block.y * block.z;
  const size_t count = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (!threads || threads > 1024 || block.z > 64)
    fail("kernel launch: a block has 1 to 1024 threads");
  if (!count || grid.x > 0x7fffffff || grid.y > 65535 || grid.z > 65535)
    fail("kernel launch: invalid grid size");
  if (shared_bytes > shared_memory_limit)
    fail("kernel launch: " + std::to_string(shared_bytes) +
         " bytes of shared memory, a block has " + std::to_string(shared_memory_limit));
  const size_t resident = cooperative ? count : 1;
  if (resident > 16) fail("cooperative kernel launch: more blocks than are resident at a time");
  thread_body = &thread;
  gridDim = grid;
  blockDim = block;
  shared_size = shared_bytes;
#ifdef LMENGINE_TSAN
  scheduler_tsan = __tsan_get_current_fiber();
#endif
  // two sets in turn: neighbouring blocks then are different threads to ThreadSanitizer
  std::vector<Block> sets[2] = {std::vector<Block>(resident), std::vector<Block>(resident)};
  for (std::vector<Block>& set : sets) {
    for (Block& member : set) {
      void* allocated = nullptr;
      if (posix_memalign(&allocated, 1024, shared_bytes))
        fail("no memory for the blocks' shared memory");
      member.shared = static_cast<unsigned char*>(allocated);
    }
  }
  slot_number(std::min<size_t>(2, count / resident) * resident * threads -
              1);  // made now: what is made later comes after what ran
  release(&start_order);
  const bool backwards = reversed();
  for (size_t number = 0; number < count; number += resident) {
    const size_t which = number / resident % 2;
    for (size_t i = 0; i < resident; ++i) {
      const size_t n = backwards ? count - 1 - number - i : number + i;
      const uint3 index{static_cast<unsigned>(n % grid.x),
                        static_cast<unsigned>(n / grid.x % grid.y),
                        static_cast<unsigned>(n / grid.x / grid.y)};
      fill(sets[which][i], index, (which * resident + i) * threads);
    }
    run_blocks(sets[which]);
  }
  acquire(&end_order);
  for (std::vector<Block>& set : sets) {
    for (Block& member : set) std::free(member.shared);
  }
  thread_body = nullptr;
}

namespace {

template <float (*value)(uint16_t)>
void mma(void* const* arguments) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& fragments = *static_cast<MmaArguments*>(arguments[lane]);
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 8; ++i) {
      a[group + (i / 2 % 2) * 8][pair + i % 2 + (i / 4) * 8] =
          value(static_cast<uint16_t>(fragments.a[i / 2] >> (i % 2 * 16)));
    }
    for (int i = 0; i < 4; ++i) {
      b[pair + i % 2 + (i / 2) * 8][group] =
          value(static_cast<uint16_t>(fragments.b[i / 2] >> (i % 2 * 16)));
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<MmaArguments*>(arguments[lane])->d;
    const int group = lane / 4, pair = 2 * (lane % 4);
    for (int i = 0; i < 4; ++i) d[i] += product[group + i / 2 * 8][pair + i % 2];
  }
}

}  // namespace

void mma_bfloat16(void* const* arguments) { mma<bfloat16_value>(arguments); }
void mma_half(void* const* arguments) { mma<half_value>(arguments); }

}  // namespace lmengine::emulation
