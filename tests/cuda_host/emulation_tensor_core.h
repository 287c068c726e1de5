// The primitives of csrc/support/tensor_core.h for the emulation, with PTX's fragment layouts.
// Included by emulation.h.
#pragma once

namespace lmengine::emulation {

inline void check_aligned(const void* address, const char* name, const Location& where) {
  if (reinterpret_cast<uintptr_t>(address) % 16)
    fail(std::string(name) + ": address not 16-byte aligned", &where);
}

inline void check_whole_warps(const char* name, const Location& where) {
  if (blockDim.x * blockDim.y * blockDim.z % 32)
    fail(std::string(name) + ": needs whole warps", &where);
}

struct MmaArguments {
  const uint32_t* a;
  const uint32_t* b;
  float* d;
};

// In emulation.cpp: element values out of the lanes' fragments, d += a b, back into the fragments.
void mma_bfloat16(void* const* arguments);
void mma_half(void* const* arguments);

template <class T>
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Location where = Location::current()) {
  constexpr bool is_bfloat16 = std::is_same_v<T, __nv_bfloat16>;
  static_assert(is_bfloat16 || std::is_same_v<T, __half>,
                "mma_m16n8k16: T is __nv_bfloat16 or __half");
  check_whole_warps("mma_m16n8k16", where);
  MmaArguments mine{a, b, d};
  if constexpr (is_bfloat16) {
    warp_instruction("mma_m16n8k16<bf16>", 0xffffffff, &mine, mma_bfloat16, where);
  } else {
    warp_instruction("mma_m16n8k16<half>", 0xffffffff, &mine, mma_half, where);
  }
}

struct LdmatrixArguments {
  uint16_t row[8];  // the row whose address this lane gives
  uint32_t* r;
};

template <int matrices, bool transposed>
__attribute__((no_sanitize_thread)) inline void ldmatrix_complete(void* const* arguments) {
  for (int lane = 0; lane < 32; ++lane) {
    for (int matrix = 0; matrix < matrices; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int row = transposed ? 2 * (lane % 4) + i : lane / 4;
        const int column = transposed ? lane / 4 : 2 * (lane % 4) + i;
        pair[i] = static_cast<LdmatrixArguments*>(arguments[matrix * 8 + row])->row[column];
      }
      static_cast<LdmatrixArguments*>(arguments[lane])->r[matrix] =
          pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  }
}

template <int matrices, bool transposed>
inline void ldmatrix(const char* name, uint32_t* r, const void* shared, const Location& where) {
  check_whole_warps(name, where);
  LdmatrixArguments mine;
  mine.r = r;
  if (lane() < matrices * 8) {
    check_aligned(shared, name, where);
    check_shared(shared, 16, name, where);
    std::memcpy(mine.row, shared, 16);
  }
  warp_instruction(name, 0xffffffff, &mine, ldmatrix_complete<matrices, transposed>, where);
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared,
                        Location where = Location::current()) {
  ldmatrix<4, false>("ldmatrix_x4", r, shared, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared,
                              Location where = Location::current()) {
  ldmatrix<4, true>("ldmatrix_x4_trans", r, shared, where);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* shared,
                        Location where = Location::current()) {
  ldmatrix<2, false>("ldmatrix_x2", r, shared, where);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared,
                              Location where = Location::current()) {
  ldmatrix<2, true>("ldmatrix_x2_trans", r, shared, where);
}

// The source is read at once, the destination written by cp_async_wait; until then it holds NaN, so
// that neither what was there before nor what is to come can be read by mistake.
inline void cp_async_16(void* shared, const void* global, bool valid = true,
                        Location where = Location::current()) {
  check_aligned(shared, "cp_async_16 (shared)", where);
  check_shared(shared, 16, "cp_async_16", where);
  unsigned char bytes[16] = {};
  if (valid) {
    check_aligned(global, "cp_async_16 (global)", where);
    std::memcpy(bytes, global, 16);
  }
  std::memset(shared, 0xff, 16);
  copy_later(shared, bytes);
}

inline void cp_async_commit() { close_group(); }

template <int pending>
inline void cp_async_wait() {
  static_assert(pending >= 0);
  wait_groups(pending);
}

}  // namespace lmengine::emulation
