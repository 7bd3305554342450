// wgmma: asynchronous matrix products of a warpgroup (four warps), 64 rows by N columns by 16 deep. sm_90a.
//
// The float32 accumulator of N columns is float acc[N / 2] per thread: with lane l of warp w, acc[4 n + {0, 1}] is row
// 16 w + l / 4, columns 8 n + 2 (l % 4) + {0, 1}; acc[4 n + {2, 3}] the same columns, 8 rows below. A from registers is
// 16 columns of the same pattern, packed in pairs: (row, k 0-7), (row + 8, k 0-7), (row, k 8-15), (row + 8, k 8-15).
//
// The compiler must see every index of an accumulator as a constant, and must not move it while products are in flight;
// where it cannot, it serialises the products and says so (C7510 and its like): read the build's warnings.
#pragma once

#include <cstdint>

// The element types, defined in cuda/tile/convert.h; here they only choose the instruction.
namespace jax_flash {
struct BFloat16;
struct Float16;
}  // namespace jax_flash

namespace jax_flash::ptx {

// wgmma.fence: registers written by ordinary instructions may be read by the products that follow
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// wgmma.commit_group
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wgmma.wait_group: at most kPending committed groups are still running
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// No instruction: the compiler must have these registers' values here, and may not move their reads and writes across.
template <int kCount>
__device__ __forceinline__ void fence_operand(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kCount>
__device__ __forceinline__ void fence_operand(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// No instruction: hides where a value comes from, so that what is derived from it is computed again where it is used
// and not kept in registers across a loop.
__device__ __forceinline__ void launder(uint64_t& value) { asm volatile("" : "+l"(value)); }

// How a tile's 16-byte chunks are permuted in shared memory: XORed with the row's number, as TMA writes them. A row of
// the tile is as wide as the swizzle. The values are the descriptor's.
enum class Swizzle : int { k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };
__host__ __device__ constexpr int swizzle_bytes(Swizzle swizzle) { return 256 >> static_cast<int>(swizzle); }

// The descriptor of a tile in shared memory made of panels, each [rows][swizzle_bytes] and aligned to 1024 bytes.
// K-major (the summed axis lies along the panel's rows): `panel_bytes` is not read, one instruction stays in one panel.
// MN-major (the summed axis runs down the panel's rows): `panel_bytes` is the way to the panel of the next columns.
// Add (byte offset >> 4) to move: by 32 bytes for 16 k of a K-major panel, by 16 rows for 16 k of an MN-major one.
__device__ __forceinline__ uint64_t wgmma_descriptor(const void* sTile, Swizzle swizzle, int panel_bytes) {
  const uint64_t start = (static_cast<uint32_t>(__cvta_generic_to_shared(sTile)) & 0x3FFFF) >> 4;
  const uint64_t leading = static_cast<uint64_t>(panel_bytes >> 4) << 16;
  const uint64_t stride = static_cast<uint64_t>(8 * swizzle_bytes(swizzle) >> 4) << 32;
  return start | leading | stride | static_cast<uint64_t>(swizzle) << 62;
}

enum class Major : int { kK = 0, kMN = 1 };

// wgmma.mma_async.m64nNk16, f32 accumulators. kN is the number of columns.
//   wgmma<T, kN, kMajorA, kMajorB>(acc, a_descriptor, b_descriptor, accumulate)   A and B in shared memory
//   wgmma<T, kN, kMajorB>(acc, a, b_descriptor, accumulate)                       A in registers
// accumulate = 0 overwrites acc.
template <class T, int kN>
struct Wgmma;

// Operand lists, eight registers a step.
#define JF_REGS_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define JF_REGS_32 JF_REGS_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define JF_REGS_48 JF_REGS_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define JF_REGS_64 JF_REGS_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define JF_REGS_80 JF_REGS_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define JF_REGS_96 JF_REGS_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define JF_REGS_112 JF_REGS_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define JF_REGS_128 JF_REGS_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define JF_REGS_144 JF_REGS_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define JF_REGS_160 JF_REGS_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define JF_REGS_176 JF_REGS_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define JF_REGS_192 JF_REGS_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define JF_REGS_208 JF_REGS_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define JF_REGS_224 JF_REGS_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define JF_REGS_240 JF_REGS_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define JF_REGS_256 JF_REGS_240 ",%120,%121,%122,%123,%124,%125,%126,%127"

#define JF_ACC8(i)                                                                                        \
  "+f"(acc[i]), "+f"(acc[i + 1]), "+f"(acc[i + 2]), "+f"(acc[i + 3]), "+f"(acc[i + 4]), "+f"(acc[i + 5]), \
      "+f"(acc[i + 6]), "+f"(acc[i + 7])
#define JF_ACC_16 JF_ACC8(0)
#define JF_ACC_32 JF_ACC_16, JF_ACC8(8)
#define JF_ACC_48 JF_ACC_32, JF_ACC8(16)
#define JF_ACC_64 JF_ACC_48, JF_ACC8(24)
#define JF_ACC_80 JF_ACC_64, JF_ACC8(32)
#define JF_ACC_96 JF_ACC_80, JF_ACC8(40)
#define JF_ACC_112 JF_ACC_96, JF_ACC8(48)
#define JF_ACC_128 JF_ACC_112, JF_ACC8(56)
#define JF_ACC_144 JF_ACC_128, JF_ACC8(64)
#define JF_ACC_160 JF_ACC_144, JF_ACC8(72)
#define JF_ACC_176 JF_ACC_160, JF_ACC8(80)
#define JF_ACC_192 JF_ACC_176, JF_ACC8(88)
#define JF_ACC_208 JF_ACC_192, JF_ACC8(96)
#define JF_ACC_224 JF_ACC_208, JF_ACC8(104)
#define JF_ACC_240 JF_ACC_224, JF_ACC8(112)
#define JF_ACC_256 JF_ACC_240, JF_ACC8(120)

// The same as pure outputs, for a product that overwrites.
#define JF_OUT8(i)                                                                                        \
  "=f"(acc[i]), "=f"(acc[i + 1]), "=f"(acc[i + 2]), "=f"(acc[i + 3]), "=f"(acc[i + 4]), "=f"(acc[i + 5]), \
      "=f"(acc[i + 6]), "=f"(acc[i + 7])
#define JF_OUT_16 JF_OUT8(0)
#define JF_OUT_32 JF_OUT_16, JF_OUT8(8)
#define JF_OUT_48 JF_OUT_32, JF_OUT8(16)
#define JF_OUT_64 JF_OUT_48, JF_OUT8(24)
#define JF_OUT_80 JF_OUT_64, JF_OUT8(32)
#define JF_OUT_96 JF_OUT_80, JF_OUT8(40)
#define JF_OUT_112 JF_OUT_96, JF_OUT8(48)
#define JF_OUT_128 JF_OUT_112, JF_OUT8(56)
#define JF_OUT_144 JF_OUT_128, JF_OUT8(64)
#define JF_OUT_160 JF_OUT_144, JF_OUT8(72)
#define JF_OUT_176 JF_OUT_160, JF_OUT8(80)
#define JF_OUT_192 JF_OUT_176, JF_OUT8(88)
#define JF_OUT_208 JF_OUT_192, JF_OUT8(96)
#define JF_OUT_224 JF_OUT_208, JF_OUT8(104)
#define JF_OUT_240 JF_OUT_224, JF_OUT8(112)
#define JF_OUT_256 JF_OUT_240, JF_OUT8(120)

// R0 ... R6 number the operands after the accumulator: N/2, N/2 + 1, ...
#define JF_WGMMA(TYPE, NAME, N, R0, R1, R2, R3, R4, R5, R6)                                                            \
  template <>                                                                                                          \
  struct Wgmma<TYPE, N> {                                                                                              \
    template <Major kMajorA, Major kMajorB>                                                                            \
    static __device__ __forceinline__ void shared(float (&acc)[N / 2], uint64_t a, uint64_t b, int accumulate) {       \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #R2                                                      \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" JF_REGS_##N                    \
                   "}, %" #R0 ", %" #R1 ", keep, 1, 1, %" #R3 ", %" #R4 ";\n}"                                         \
                   : JF_ACC_##N                                                                                        \
                   : "l"(a), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB))); \
    }                                                                                                                  \
    template <Major kMajorA, Major kMajorB>                                                                            \
    static __device__ __forceinline__ void overwrite(float (&acc)[N / 2], uint64_t a, uint64_t b) {                    \
      asm volatile(                                                                                                    \
          "{\n.reg .pred keep;\nsetp.ne.b32 keep, 0, 0;\n"                                                             \
          "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" JF_REGS_##N                             \
          "}, %" #R0 ", %" #R1 ", keep, 1, 1, %" #R2 ", %" #R3 ";\n}"                                                  \
          : JF_OUT_##N                                                                                                 \
          : "l"(a), "l"(b), "n"(static_cast<int>(kMajorA)), "n"(static_cast<int>(kMajorB)));                           \
    }                                                                                                                  \
    template <Major kMajorB>                                                                                           \
    static __device__ __forceinline__ void registers(float (&acc)[N / 2], uint32_t a0, uint32_t a1, uint32_t a2,       \
                                                     uint32_t a3, uint64_t b, int accumulate) {                        \
      asm volatile("{\n.reg .pred keep;\nsetp.ne.b32 keep, %" #R5                                                      \
                   ", 0;\n"                                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" JF_REGS_##N                    \
                   "}, {%" #R0 ",%" #R1 ",%" #R2 ",%" #R3 "}, %" #R4 ", keep, 1, 1, %" #R6 ";\n}"                      \
                   : JF_ACC_##N                                                                                        \
                   : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(accumulate), "n"(static_cast<int>(kMajorB)));     \
    }                                                                                                                  \
  };
#define JF_WGMMA_BOTH(...)                \
  JF_WGMMA(BFloat16, "bf16", __VA_ARGS__) \
  JF_WGMMA(Float16, "f16", __VA_ARGS__)

JF_WGMMA_BOTH(16, 8, 9, 10, 11, 12, 13, 14)
JF_WGMMA_BOTH(32, 16, 17, 18, 19, 20, 21, 22)
JF_WGMMA_BOTH(48, 24, 25, 26, 27, 28, 29, 30)
JF_WGMMA_BOTH(64, 32, 33, 34, 35, 36, 37, 38)
JF_WGMMA_BOTH(80, 40, 41, 42, 43, 44, 45, 46)
JF_WGMMA_BOTH(96, 48, 49, 50, 51, 52, 53, 54)
JF_WGMMA_BOTH(112, 56, 57, 58, 59, 60, 61, 62)
JF_WGMMA_BOTH(128, 64, 65, 66, 67, 68, 69, 70)
JF_WGMMA_BOTH(144, 72, 73, 74, 75, 76, 77, 78)
JF_WGMMA_BOTH(160, 80, 81, 82, 83, 84, 85, 86)
JF_WGMMA_BOTH(176, 88, 89, 90, 91, 92, 93, 94)
JF_WGMMA_BOTH(192, 96, 97, 98, 99, 100, 101, 102)
JF_WGMMA_BOTH(208, 104, 105, 106, 107, 108, 109, 110)
JF_WGMMA_BOTH(224, 112, 113, 114, 115, 116, 117, 118)
JF_WGMMA_BOTH(240, 120, 121, 122, 123, 124, 125, 126)
JF_WGMMA_BOTH(256, 128, 129, 130, 131, 132, 133, 134)

#undef JF_WGMMA_BOTH
#undef JF_WGMMA

template <class T, int kN, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma(float (&acc)[kN / 2], uint64_t a, uint64_t b, int accumulate) {
  Wgmma<T, kN>::template shared<kMajorA, kMajorB>(acc, a, b, accumulate);
}

// acc = A B. The compiler sees that acc's old values are not needed, so it may be a fresh variable.
template <class T, int kN, Major kMajorA, Major kMajorB>
__device__ __forceinline__ void wgmma_overwrite(float (&acc)[kN / 2], uint64_t a, uint64_t b) {
  Wgmma<T, kN>::template overwrite<kMajorA, kMajorB>(acc, a, b);
}

template <class T, int kN, Major kMajorB>
__device__ __forceinline__ void wgmma(float (&acc)[kN / 2], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                      uint64_t b, int accumulate) {
  Wgmma<T, kN>::template registers<kMajorB>(acc, a0, a1, a2, a3, b, accumulate);
}

}  // namespace jax_flash::ptx
