// Instructions of sm_90a, as plain functions: barriers in shared memory, the tensor memory
// accelerator (TMA), products of a warp group (wgmma), named barriers, registers that change hands.
// The PTX manual defines them; a warp group is 4 warps, the first a multiple of 4.
#pragma once

#include "support/tensor_core.h"
#include "support/tensor_map.h"

#ifndef LMENGINE_HOST_EMULATION
namespace lmengine {

// ---- barriers in shared memory -----------------------------------------------------------------

// A phase ends when `count` arrivals and all expected bytes have come; phases are 0 and 1 in turn.
// One thread initialises; then mbarrier_init_fence and __syncthreads.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count)
               : "memory");
}
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// Arrives, and makes the phase wait for so many bytes more.
__device__ __forceinline__ void mbarrier_arrive_expecting(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Waits until the phase of this parity has ended. That of parity 1 counts as ended at the start.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// ---- tiles -------------------------------------------------------------------------------------

// Copies the map's box that begins at these coordinates to shared memory, 1024-byte aligned, in the
// background; zeros where it lies outside the tensor. All of the box's bytes count at the barrier.
__device__ __forceinline__ void tma_load(void* shared, const TensorMap* map, uint64_t* barrier,
                                         int x, int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4, %5, %6}], [%2];" ::"r"(shared_address(shared)),
      "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(row), "r"(head), "r"(batch)
      : "memory");
}

// The same for `bytes` that lie one after the other, a multiple of 16 as both addresses are.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// Adds to 4 floats in global memory, 16-byte aligned, each by itself atomically.
__device__ __forceinline__ void add_to_global(float* to, float a, float b, float c, float d) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a),
               "f"(b), "f"(c), "f"(d)
               : "memory");
}

// Between writes to shared memory by this thread and their use by a product or a copy.
__device__ __forceinline__ void fence_async_proxy() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- products ----------------------------------------------------------------------------------

// Before the first product of a group, and after its registers were touched.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `pending` groups are under way.
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
}

// wgmma<columns, T, ...>(d, a, b, accumulate): d = a b, or d += a b, in the background, for a (64,
// 16) and b (16, columns) and d in float. Warp w of the group has rows 16 w to 16 w + 15, of which
// a lane holds, with group = lane / 4 and pair = 2 * (lane % 4),
//   d[4 j..] columns 8 j + pair, + 1 of row `group`, then of row `group` + 8
//   a[..]    as mma_m16n8k16 does; or a is a descriptor of a tile in shared memory
// b is a descriptor; `transposed`: not k but the other dimension is contiguous in the tile.
#define LMENGINE_NAMES0                                                                    \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
  "%24,%25,%26,%27,%28,%29,%30,%31"
#define LMENGINE_NAMES1                                                                  \
  "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52," \
  "%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define LMENGINE_NAMES64_TO_87                                                               \
  "%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85," \
  "%86,%87"
#define LMENGINE_NAMES2 LMENGINE_NAMES64_TO_87 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define LMENGINE_NAMES3                                                                    \
  "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113," \
  "%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define LMENGINE_D8(i)                                                                        \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define LMENGINE_D32(i) LMENGINE_D8(i), LMENGINE_D8(i + 8), LMENGINE_D8(i + 16), LMENGINE_D8(i + 24)
#define LMENGINE_D64(i) LMENGINE_D32(i), LMENGINE_D32(i + 32)
#define LMENGINE_D88(i) \
  LMENGINE_D64(i), LMENGINE_D8(i + 64), LMENGINE_D8(i + 72), LMENGINE_D8(i + 80)
#define LMENGINE_D128(i) LMENGINE_D64(i), LMENGINE_D64(i + 64)

// With a in registers and in shared memory; o0 to o6 are the numbers of the operands behind d.
#define LMENGINE_WGMMA_RS(n, type, names, D, o0, o1, o2, o3, o4, o5, o6)                   \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o5                                      \
               ", 0;\n"                                                                    \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names  \
               "}, {" o0 "," o1 "," o2 "," o3 "}, " o4 ", p, 1, 1, " o6 ";\n}"             \
               : D(0)                                                                      \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)), \
                 "n"(int(b_transposed)));
#define LMENGINE_WGMMA_SS(n, type, names, D, o0, o1, o2, o3, o4, o5, o6)                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " o2                                              \
               ", 0;\n"                                                                            \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" names "}, " o0 \
               ", " o1 ", p, 1, 1, " o3 ", " o4 ";\n}"                                             \
               : D(0)                                                                              \
               : "l"(a), "l"(b), "r"(int(accumulate)), "n"(int(a_transposed)),                     \
                 "n"(int(b_transposed)));

#define LMENGINE_WGMMA_TYPES(WGMMA, n, ...)    \
  if constexpr (columns == n) {                \
    if constexpr (std::is_same_v<T, __half>) { \
      WGMMA(n, "f16", __VA_ARGS__)             \
    } else {                                   \
      WGMMA(n, "bf16", __VA_ARGS__)            \
    }                                          \
  }

#define LMENGINE_WGMMA_COLUMNS(WGMMA)                                                              \
  static_assert(columns == 64 || columns == 128 || columns == 176 || columns == 256);              \
  LMENGINE_WGMMA_TYPES(WGMMA, 64, LMENGINE_NAMES0, LMENGINE_D32, "%32", "%33", "%34", "%35",       \
                       "%36", "%37", "%38")                                                        \
  LMENGINE_WGMMA_TYPES(WGMMA, 128, LMENGINE_NAMES0 "," LMENGINE_NAMES1, LMENGINE_D64, "%64",       \
                       "%65", "%66", "%67", "%68", "%69", "%70")                                   \
  LMENGINE_WGMMA_TYPES(WGMMA, 176, LMENGINE_NAMES0 "," LMENGINE_NAMES1 "," LMENGINE_NAMES64_TO_87, \
                       LMENGINE_D88, "%88", "%89", "%90", "%91", "%92", "%93", "%94")              \
  LMENGINE_WGMMA_TYPES(                                                                            \
      WGMMA, 256, LMENGINE_NAMES0 "," LMENGINE_NAMES1 "," LMENGINE_NAMES2 "," LMENGINE_NAMES3,     \
      LMENGINE_D128, "%128", "%129", "%130", "%131", "%132", "%133", "%134")

template <int columns, class T, bool b_transposed>
__device__ __forceinline__ void wgmma(float (&d)[columns / 2], const uint32_t (&a)[4], uint64_t b,
                                      bool accumulate) {
  LMENGINE_WGMMA_COLUMNS(LMENGINE_WGMMA_RS)
}

template <int columns, class T, bool a_transposed, bool b_transposed>
__device__ __forceinline__ void wgmma(float (&d)[columns / 2], uint64_t a, uint64_t b,
                                      bool accumulate){LMENGINE_WGMMA_COLUMNS(LMENGINE_WGMMA_SS)}

// ---- warps -------------------------------------------------------------------------------------

// Barriers 1 to 15 of a block: waits until `threads` threads, in whole warps, wait here or have
// arrived.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// How many registers the threads of this warp group have from here on.
template <int count>
__device__ __forceinline__ void set_registers_up() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}
template <int count>
__device__ __forceinline__ void set_registers_down() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace lmengine
#endif

namespace lmengine {

// A tile as copies of 64 elements by `rows` rows leave it: a panel for every 64 elements of dim,
// `rows` lines of 128 bytes long, whose 16-byte chunks are permuted by the line's number modulo 8.
// A product takes either the lines as its rows (of a) or columns (of b), and sums over dim; or dim
// as those, and sums over the lines: that is what it calls transposed. A descriptor holds the
// address, the bytes between panels (of a transposed tile) and those between 8 lines, in units of
// 16 bytes, and the kind of permutation.
__device__ __forceinline__ uint64_t tile_descriptor(const void* tile, int rows, bool transposed) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) |
         static_cast<uint64_t>(transposed ? rows * 128 >> 4 : 1) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}
// The k-th 16 of dim, to be summed over.
__device__ __forceinline__ uint64_t along_dim(uint64_t descriptor, int rows, int k) {
  return descriptor + ((k / 4 * rows * 128 + k % 4 * 32) >> 4);
}
// From this line on, a multiple of 8.
__device__ __forceinline__ uint64_t along_rows(uint64_t descriptor, int row) {
  return descriptor + (row * 128 >> 4);
}

}  // namespace lmengine
