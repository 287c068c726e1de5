// What emulation_sm90.h declares. Like emulation.cpp compiled without sanitizers; it tells
// ThreadSanitizer what the accelerator and the products read and write.
#include "cuda_host/emulation_sm90.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <set>
#include <vector>

#ifdef LMENGINE_TSAN
extern "C" {
void __tsan_write_range(void* address, unsigned long bytes);
void __tsan_read_range(void* address, unsigned long bytes);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace lmengine::emulation {
namespace {

// While one lives, ThreadSanitizer looks away: the emulation's own memory is everybody's.
class Unwatched {
 public:
#ifdef LMENGINE_TSAN
  Unwatched() { AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0); }
  ~Unwatched() { AnnotateIgnoreReadsEnd("", 0), AnnotateIgnoreWritesEnd("", 0); }
#else
  Unwatched() {}
  ~Unwatched() {}
#endif
  Unwatched(const Unwatched&) = delete;
  Unwatched& operator=(const Unwatched&) = delete;
};

#ifdef LMENGINE_TSAN
void tell_write(void* address, size_t bytes) { __tsan_write_range(address, bytes); }
void tell_read(void* address, size_t bytes) { __tsan_read_range(address, bytes); }
#else
void tell_write(void*, size_t) {}
void tell_read(void*, size_t) {}
#endif

constexpr uint32_t kReserved = 1024;  // shared memory that CUDA keeps at the beginning
// a signalling NaN: arithmetic on it changes its bits
constexpr uint32_t kInFlight = 0x7fadcba9;

struct Tile {
  unsigned char* destination;
  std::string bytes;
  uint64_t* barrier;
};

// An accumulator whose registers may not be touched: products on it are under way.
struct Accumulator {
  float* d;
  int n, products;
  std::vector<float> value;
};

struct Thread {
  std::vector<Product> products;
  std::vector<Accumulator> accumulators;
  int open_group = 0;
  size_t issued = 0;
  bool fenced = false;
  char order = 0;
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  unsigned generation = 0;
  char order = 0;
};

struct BlockState {
  size_t shared_bytes = 0;
  std::string proxy;  // shared memory as products and the accelerator see it
  std::vector<Tile> tiles;
  std::set<uint64_t*> barriers;
  std::vector<Thread> threads;
  std::vector<std::vector<Product>> issued;  // by warp group: what its first thread asked for
  NamedBarrier named[16];
};

std::map<unsigned char*, std::unique_ptr<BlockState>> blocks;

BlockState& state() { return *blocks.at(shared_memory()); }
Thread& thread() { return state().threads[static_cast<size_t>(thread_index())]; }

void block_start(unsigned char* shared, size_t bytes, int threads) {
  const Unwatched unwatched;
  auto& block = blocks[shared] = std::make_unique<BlockState>();
  block->shared_bytes = bytes;
  block->proxy.assign(bytes, '\xff');
  block->threads.resize(static_cast<size_t>(threads));
  block->issued.resize(static_cast<size_t>(threads + 127) / 128);
}

void blocks_end() {
  const Unwatched unwatched;
  for (const auto& [shared, block] : blocks) {
    if (!block->tiles.empty()) fail("a block has returned while a tile was under way to it");
    for (const Thread& thread : block->threads)
      if (!thread.products.empty()) fail("a thread has returned without waiting for its products");
    for (size_t i = 0; i < block->threads.size(); ++i)
      if (block->threads[i].issued != block->issued[i / 128].size())
        fail("the threads of a warp group have not issued the same products");
    for (const NamedBarrier& barrier : block->named)
      if (barrier.arrived) fail("a named barrier has arrivals that nobody waited for");
  }
  blocks.clear();
}

// The barrier's word as fields; CUDA leaves its layout open.
struct Word {
  uint64_t count : 10, pending : 10, phase : 1, valid : 11;
  int64_t bytes : 32;
};
static_assert(sizeof(Word) == 8);
constexpr uint64_t kValid = 0x2a5;

Word load(uint64_t* barrier, const char* name, const Location& where) {
  check_shared(barrier, 8, name, where);
  if (reinterpret_cast<uintptr_t>(barrier) % 8)
    fail(std::string(name) + ": address not 8-byte aligned", &where);
  Word word;
  std::memcpy(&word, barrier, 8);
  if (word.valid != kValid || !state().barriers.count(barrier))
    fail(std::string(name) + ": a barrier that was not initialised", &where);
  return word;
}

void store(uint64_t* barrier, Word word) {
  if (word.pending == 0 && word.bytes == 0) word.pending = word.count, word.phase ^= 1;
  std::memcpy(barrier, &word, 8);
}

bool deliver() {
  const Unwatched unwatched;
  const char* order = std::getenv("LMENGINE_EMULATION_ORDER");
  const bool backwards = order && std::string(order) == "reverse";
  for (const auto& [shared, block] : blocks) {
    if (block->tiles.empty()) continue;
    const auto place = backwards ? block->tiles.end() - 1 : block->tiles.begin();
    const Tile tile = std::move(*place);
    block->tiles.erase(place);
    std::memcpy(tile.destination, tile.bytes.data(), tile.bytes.size());
    std::memcpy(block->proxy.data() + (tile.destination - shared), tile.bytes.data(),
                tile.bytes.size());
    Word word;
    std::memcpy(&word, tile.barrier, 8);
    word.bytes -= static_cast<int64_t>(tile.bytes.size());
    store(tile.barrier, word);
    return true;
  }
  return false;
}

}  // namespace

bool use_sm90() {
  shared_memory_limit = 227 * 1024;
  on_block_start = block_start;
  on_idle = deliver;
  on_blocks_end = blocks_end;
  return true;
}

uint32_t shared_address(const void* shared) {
  return kReserved +
         static_cast<uint32_t>(static_cast<const unsigned char*>(shared) - shared_memory());
}

// ---- barriers ----------------------------------------------------------------------------------

void mbarrier_init(uint64_t* barrier, unsigned count, const Location& where) {
  const Unwatched unwatched;
  check_shared(barrier, 8, "mbarrier_init", where);
  if (count < 1 || count > 1023) fail("mbarrier_init: the emulation counts to 1023", &where);
  Word word{};
  word.count = word.pending = count, word.valid = kValid;
  std::memcpy(barrier, &word, 8);
  state().barriers.insert(barrier);
}

void mbarrier_arrive(uint64_t* barrier, unsigned bytes, const Location& where) {
  const Unwatched unwatched;
  Word word = load(barrier, "mbarrier_arrive", where);
  if (word.pending == 0) fail("mbarrier_arrive: more arrivals than the barrier counts", &where);
  word.bytes += bytes;
  word.pending -= 1;
  release(barrier);
  store(barrier, word);
}

bool mbarrier_test(uint64_t* barrier, unsigned parity, const Location& where) {
  const Unwatched unwatched;
  if (parity > 1) fail("mbarrier_wait: the parity is 0 or 1", &where);
  if (load(barrier, "mbarrier_wait", where).phase == parity) return false;
  acquire(barrier);
  return true;
}

void named_barrier(int id, int threads, bool wait, const Location& where) {
  BlockState& block = state();
  if (id < 1 || id > 15) fail("named barrier: expected an id from 1 to 15", &where);
  if (threads % 32 || threads <= 0 || threads > static_cast<int>(block.threads.size()))
    fail("named barrier: expected whole warps of the block", &where);
  NamedBarrier& barrier = block.named[id];
  if (barrier.arrived && barrier.threads != threads)
    fail("named barrier: other threads wait for another number of threads", &where);
  barrier.threads = threads;
  release(&barrier.order);
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == threads) barrier.arrived = 0, ++barrier.generation;
  if (!wait) return;
  while (barrier.generation == generation) spin();
  acquire(&barrier.order);
}

// ---- tiles -------------------------------------------------------------------------------------

// The 128-byte swizzle: the number of a 16-byte chunk in its line of 128 bytes, exclusive or the
// line's number in its 1024 bytes.
static uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

void bytes_later(void* shared, std::string bytes, bool swizzle, uint64_t* barrier,
                 const Location& where) {
  tell_write(shared, bytes.size());
  const Unwatched unwatched;
  load(barrier, "tma_load", where);
  check_shared(shared, bytes.size(), "tma_load", where);
  const uint32_t address = shared_address(shared);
  if (swizzle && address % 1024) fail("tma_load: the tile is not 1024-byte aligned", &where);
  BlockState& block = state();
  auto* to = static_cast<unsigned char*>(shared);
  for (const Tile& other : block.tiles)
    if (to < other.destination + other.bytes.size() && other.destination < to + bytes.size())
      fail("tma_load: another tile is under way to the same place", &where);
  std::string lines(bytes.size(), '\0');
  for (uint32_t i = 0; i < bytes.size(); i += 16)
    std::memcpy(lines.data() + (swizzle ? swizzled(address + i) - address : i), bytes.data() + i,
                16);
  std::memset(shared, 0xff, bytes.size());
  std::memset(block.proxy.data() + (to - shared_memory()), 0xff, bytes.size());

  release(barrier);
  block.tiles.push_back({to, std::move(lines), barrier});
}

void fence_async_proxy() {
  const Unwatched unwatched;
  BlockState& block = state();
  std::memcpy(block.proxy.data(), shared_memory(), block.shared_bytes);
}

// ---- products ----------------------------------------------------------------------------------

namespace {

// The 16-bit element (row, k) of a matrix that a descriptor describes; rows are the dimension that
// is not summed over. Without `transposed` k is contiguous: lines of 128 bytes, 8 lines together,
// the next 8 after the stride offset. With it rows are: 64 of them in a line, the next 64 after the
// leading offset; a line for each k, 8 lines together, the next 8 after the stride offset.
class Operand {
 public:
  Operand(uint64_t descriptor, bool transposed, const Location& where)
      : start_(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        leading_(static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4),
        stride_(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        transposed_(transposed),
        where_(where) {
    if (descriptor >> 62 != 1) fail("wgmma: only the 128-byte swizzle is emulated", &where);
    if (descriptor >> 49 & 7) fail("wgmma: a base offset is not emulated", &where);
    if (descriptor & 0x3ff1c000c000c000)
      fail("wgmma: bits of the descriptor that have to be 0 are not", &where);
  }

  uint16_t at(const BlockState& block, int row, int k) const {
    const uint32_t offset = transposed_
                                ? row / 64 * leading_ + k / 8 * stride_ + k % 8 * 128 + row % 64 * 2
                                : row / 8 * stride_ + row % 8 * 128 + k * 2;
    const uint32_t address = swizzled(start_ + offset) - kReserved;
    if (address + 2 > block.shared_bytes)
      fail("wgmma: the descriptor leads outside the block's shared memory", &where_);
    uint16_t bits;
    std::memcpy(&bits, block.proxy.data() + address, 2);
    return bits;
  }

  // What ThreadSanitizer has to know: the lines that hold rows [first, first + count).
  void tell(unsigned char* shared, int first, int count) const {
    for (int row = first; row < first + count; row += transposed_ ? 64 : 1)
      for (int k = 0; k < (transposed_ ? 16 : 1); ++k) {
        const uint32_t offset = transposed_ ? row / 64 * leading_ + k / 8 * stride_ + k % 8 * 128
                                            : row / 8 * stride_ + row % 8 * 128;
        tell_read(shared + ((start_ + offset) & ~127u) - kReserved, 128);
      }
  }

 private:
  uint32_t start_, leading_, stride_;
  bool transposed_;
  const Location& where_;
};

bool same(const Product& a, const Product& b) {
  return a.n == b.n && a.a == b.a && a.b == b.b && a.a_transposed == b.a_transposed &&
         a.b_transposed == b.b_transposed && a.accumulate == b.accumulate &&
         a.is_half == b.is_half && (a.a_registers == nullptr) == (b.a_registers == nullptr) &&
         a.group == b.group;
}

Accumulator& accumulator_of(Thread& thread, float* d) {
  for (Accumulator& accumulator : thread.accumulators)
    if (accumulator.d == d) return accumulator;
  fail("wgmma: an accumulator is missing");
}

// One warp's 16 rows of a product: of all lanes the same product, in `threads`.
void execute(BlockState& block, Thread* const* threads, size_t index, int warp) {
  const Product& product = threads[0]->products[index];
  if (!product.a_registers)
    Operand(product.a, product.a_transposed, product.where)
        .tell(shared_memory(), product.a_transposed ? 0 : warp % 4 * 16, 16);
  Operand(product.b, product.b_transposed, product.where).tell(shared_memory(), 0, product.n);
  const Unwatched unwatched;
  const auto value = product.is_half ? half_value : bfloat16_value;
  const int n = product.n;
  float a[16][16];
  std::vector<float> b(static_cast<size_t>(16 * n));
  if (product.a_registers) {
    for (int lane = 0; lane < 32; ++lane) {
      const uint32_t* registers = threads[lane]->products[index].a_registers;
      const int group = lane / 4, pair = 2 * (lane % 4);
      for (int i = 0; i < 8; ++i)
        a[group + i / 2 % 2 * 8][pair + i % 2 + i / 4 * 8] =
            value(static_cast<uint16_t>(registers[i / 2] >> i % 2 * 16));
    }
  } else {
    const Operand left(product.a, product.a_transposed, product.where);
    const int first = warp % 4 * 16;
    for (int row = 0; row < 16; ++row)
      for (int k = 0; k < 16; ++k) a[row][k] = value(left.at(block, first + row, k));
  }
  const Operand right(product.b, product.b_transposed, product.where);
  for (int k = 0; k < 16; ++k)
    for (int column = 0; column < n; ++column)
      b[static_cast<size_t>(k * n + column)] = value(right.at(block, column, k));
  std::vector<float> row_sum(static_cast<size_t>(n));
  for (int row = 0; row < 16; ++row) {
    std::fill(row_sum.begin(), row_sum.end(), 0.0f);
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < n; ++column)
        row_sum[static_cast<size_t>(column)] += a[row][k] * b[static_cast<size_t>(k * n + column)];
    for (int lane = row % 8 * 4; lane < row % 8 * 4 + 4; ++lane) {
      Accumulator& to = accumulator_of(*threads[lane], threads[lane]->products[index].d);
      for (int i = row / 8 * 2; i < n / 2; i += 4)
        for (int j = 0; j < 2; ++j) {
          float& sum = to.value[static_cast<size_t>(i + j)];
          sum = (product.accumulate ? sum : 0.0f) +
                row_sum[static_cast<size_t>(i / 4 * 8 + lane % 4 * 2 + j)];
        }
    }
  }
}

struct Wait {
  BlockState* block;
  Thread* thread;
  int pending, warp;
};

// All lanes of a warp wait: the products of groups that are no longer allowed to be under way.
void complete_wait(void* const* arguments) {
  acquire(&static_cast<Wait*>(arguments[0])->thread->order);
  Thread* threads[32];
  for (int lane = 0; lane < 32; ++lane) threads[lane] = static_cast<Wait*>(arguments[lane])->thread;
  const Wait& wait = *static_cast<Wait*>(arguments[0]);
  size_t done = 0;
  while (done < threads[0]->products.size() &&
         threads[0]->products[done].group < threads[0]->open_group - wait.pending)
    execute(*wait.block, threads, done++, wait.warp);
  const Unwatched unwatched;
  for (Thread* thread : threads) {
    for (size_t i = 0; i < done; ++i) --accumulator_of(*thread, thread->products[i].d).products;
    for (size_t i = 0; i < thread->accumulators.size();) {
      Accumulator& accumulator = thread->accumulators[i];
      if (accumulator.products) {
        ++i;
        continue;
      }
      for (int j = 0; j < accumulator.n / 2; ++j)
        if (std::memcmp(accumulator.d + j, &kInFlight, 4))
          fail("wgmma: an accumulator was written while products on it were under way");
      std::memcpy(accumulator.d, accumulator.value.data(), accumulator.value.size() * 4);
      thread->accumulators.erase(thread->accumulators.begin() + static_cast<ptrdiff_t>(i));
    }
    thread->products.erase(thread->products.begin(),
                           thread->products.begin() + static_cast<ptrdiff_t>(done));
  }
  release(&threads[0]->order);
}

}  // namespace

void product_later(const Product& product) {
  const Unwatched unwatched;
  BlockState& block = state();
  Thread& mine = thread();
  if (!mine.fenced) fail("wgmma: no wgmma_fence since the last wgmma_commit", &product.where);
  if (product.n % 8 || product.n < 8 || product.n > 256)
    fail("wgmma: expected a multiple of 8 up to 256 columns", &product.where);
  mine.products.push_back(product);
  mine.products.back().group = mine.open_group;
  auto& issued = block.issued[static_cast<size_t>(thread_index()) / 128];
  if (mine.issued == issued.size()) issued.push_back(mine.products.back());
  if (!same(issued[mine.issued++], mine.products.back()))
    fail("wgmma: the threads of a warp group ask for different products", &product.where);
  for (Accumulator& other : mine.accumulators) {
    if (other.d != product.d) continue;
    ++other.products;
    return;
  }
  mine.accumulators.push_back(
      {product.d, product.n, 1, std::vector<float>(product.d, product.d + product.n / 2)});
  for (int i = 0; i < product.n / 2; ++i) std::memcpy(product.d + i, &kInFlight, 4);
}

void product_fence() {
  const Unwatched unwatched;
  thread().fenced = true;
}

void product_commit() {
  const Unwatched unwatched;
  Thread& mine = thread();
  ++mine.open_group;
  mine.fenced = false;
}

// A warp's lanes wait together, and what the products read counts as read by all of them.
void product_wait(int pending, const Location& where) {
  if (blockDim.x % 128 || blockDim.y != 1 || blockDim.z != 1)
    fail("wgmma_wait: needs whole warp groups", &where);
  BlockState& block = state();
  char* order = &block.threads[static_cast<size_t>(thread_index()) / 32 * 32].order;
  Wait mine{&block, &thread(), pending, thread_index() / 32};
  release(order);
  warp_instruction("wgmma_wait", 0xffffffff, &mine, complete_wait, where);
  acquire(order);
}

}  // namespace lmengine::emulation
