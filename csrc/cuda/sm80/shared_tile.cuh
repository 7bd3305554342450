// Tiles of 16-bit elements in shared memory: their swizzled layout, filling them from global memory, reading fragments.
#pragma once

#include <cstdint>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/ldmatrix.cuh"
#include "cuda/tile/convert.cuh"

namespace jax_flash::sm80 {

// Row-major; the 16-byte chunks of a row trade places within groups, so that the eight rows an ldmatrix reads at one
// column, and the eight chunks of one row that a copy writes, touch all 32 banks. Where a row is an odd multiple of 64
// bytes, neighbouring rows already differ by half the banks, and groups of four chunks suffice.
template <int kCols>
struct TileLayout {
  static_assert(kCols % 32 == 0);
  static constexpr int kPitch = kCols * 2;  // bytes from row to row
  static constexpr int kGroup = kCols % 64 == 0 ? 8 : 4;

  __device__ __forceinline__ static int swizzle(int row) { return kGroup == 8 ? row & 7 : row >> 1 & 3; }
  __device__ __forceinline__ static uint32_t offset(int row, int chunk) {
    return row * kPitch + (chunk ^ swizzle(row)) * 16;
  }
};

// One 16-byte chunk from an address that is only element-aligned, or whose row ends inside it.
template <class T>
__device__ __forceinline__ uint4 gather_chunk(const T* source, int count) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = 2 * i < count ? source[2 * i].bits : 0;
    const uint32_t high = 2 * i + 1 < count ? source[2 * i + 1].bits : 0;
    pairs[i] = low | high << 16;
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

// How the threads of a block share the chunks of a tile of kCols columns. Each keeps its column within a group, so that
// swizzle and column bound are per-thread constants.
template <class T, int kCols, int kThreads>
struct TileCopy {
  using Layout = TileLayout<kCols>;
  static constexpr int kStepRows = kThreads / Layout::kGroup;

  int row, chunk;
  int head_dim;     // columns that exist
  bool aligned;     // rows start on 16 bytes and end on whole chunks
  int64_t stride;   // elements from row to row in global memory
  uint32_t offset;  // of this thread's first chunk

  __device__ __forceinline__ TileCopy(int thread, int head_dim, bool aligned, int64_t stride)
      : row(thread / Layout::kGroup),
        chunk(thread % Layout::kGroup),
        head_dim(head_dim),
        aligned(aligned),
        stride(stride),
        offset(Layout::offset(row, chunk)) {}

  // Starts filling the tile with rows 0 ... rows - 1 of `source`, zeros below and to the right of what exists. Rows
  // that do not exist are never read: they may hold NaN.
  template <int kRows>
  __device__ __forceinline__ void load(uint32_t tile, const T* source, int rows) const {
    if (!aligned) return gather<kRows>(tile, source, rows);
    const int r = ptx::launder(row);
    source += r * stride + chunk * 8;
#pragma unroll
    for (int i = 0; i < kRows; i += kStepRows) {
      if (kRows % kStepRows != 0 && r + i >= kRows) break;
#pragma unroll
      for (int c = 0; c < kCols / 8; c += Layout::kGroup) {
        ptx::cp_async_16(tile + offset + i * Layout::kPitch + c * 16, source + c * 8,
                         r + i < rows && (c + chunk) * 8 < head_dim);
      }
      source += kStepRows * stride;
    }
  }

  template <int kRows>
  __device__ __forceinline__ void gather(uint32_t tile, const T* source, int rows) const {
#pragma unroll 1
    for (int r = ptx::launder(row); r < kRows; r += kStepRows) {
#pragma unroll 1
      for (int c = chunk; c < kCols / 8; c += Layout::kGroup) {
        const int count = r < rows ? head_dim - c * 8 : 0;
        ptx::st_shared(tile + Layout::offset(r, c), gather_chunk(source + r * stride + c * 8, count));
      }
    }
  }
};

// Reads 16x16 pieces of a tile as fragments. A piece's four 8x8 matrices come in the order that the use asks for:
// kRowsFirst: (0, 0), (8, 0), (0, 8), (8, 8): an A operand as stored, or a B operand stored with k along the rows
// (trans); else: (0, 0), (0, 8), (8, 0), (8, 8): a B operand as stored, n along the rows, or a transposed A operand
// (trans).
template <int kCols, bool kRowsFirst, bool kTranspose>
struct TileReader {
  using Layout = TileLayout<kCols>;
  uint32_t base;
  uint32_t lane_chunk;

  // The origin is (row0, 8 * chunk0), row0 a multiple of 16. read() takes constants, so that all it costs is one XOR
  // for several pieces: chunk0 must have no bit, below the group's size, in common with the chunks read.
  __device__ __forceinline__ TileReader(uint32_t tile, int row0, int chunk0, int lane) {
    const int matrix = lane / 8;
    const int row = row0 + lane % 8 + (kRowsFirst ? matrix & 1 : matrix >> 1) * 8;
    const int chunk = chunk0 % Layout::kGroup + (kRowsFirst ? matrix >> 1 : matrix & 1);
    base = tile + row * Layout::kPitch + chunk0 / Layout::kGroup * (Layout::kGroup * 16);
    lane_chunk = (chunk ^ Layout::swizzle(row)) * 16;
  }

  // The piece at (row, col), multiples of 16.
  __device__ __forceinline__ void read(uint32_t (&fragment)[4], int row, int col) const {
    const int chunk = col / 8;
    const uint32_t address = base + row * Layout::kPitch + chunk / Layout::kGroup * Layout::kGroup * 16 +
                             (lane_chunk ^ chunk % Layout::kGroup * 16);
    if constexpr (kTranspose) {
      ptx::ldmatrix_x4_trans(fragment, address);
    } else {
      ptx::ldmatrix_x4(fragment, address);
    }
  }
};

// Writes a fragment of 16 rows x kFloats / 2 columns, rounded to T, at (row, col) of a tile; lane as in softmax.cuh.
template <class T, int kCols, int kFloats>
__device__ __forceinline__ void store_fragment(uint32_t tile, const float (&acc)[kFloats], int row, int col, int lane) {
  using Layout = TileLayout<kCols>;
  const int r = row + lane / 4;
#pragma unroll
  for (int n = 0; n < kFloats / 4; ++n) {
    // Rows r and r + 8 share their swizzle.
    const uint32_t address = tile + Layout::offset(r, col / 8 + n) + lane % 4 * 4;
    ptx::st_shared(address, pack<T>(acc[4 * n], acc[4 * n + 1]));
    ptx::st_shared(address + 8 * Layout::kPitch, pack<T>(acc[4 * n + 2], acc[4 * n + 3]));
  }
}

// Copies rows [row_begin, row_end) of a tile to global memory, `threads` threads of index `thread` together; rows from
// `rows` on and columns from head_dim on are left out.
template <class T, int kCols, int kThreads>
__device__ __forceinline__ void store_rows(uint32_t tile, T* target, int64_t stride, int row_begin, int row_end,
                                           int rows, int head_dim, bool aligned, int thread) {
  using Layout = TileLayout<kCols>;
  static_assert(kThreads % Layout::kGroup == 0);
  for (int r = row_begin + thread / Layout::kGroup; r < row_end && r < rows; r += kThreads / Layout::kGroup) {
#pragma unroll
    for (int c = 0; c < kCols / 8; c += Layout::kGroup) {
      const int chunk = c + thread % Layout::kGroup;
      if (chunk * 8 >= head_dim) continue;
      const uint4 value = ptx::ld_shared_v4(tile + Layout::offset(r, chunk));
      T* address = target + r * stride + chunk * 8;
      if (aligned) {
        *reinterpret_cast<uint4*>(address) = value;
      } else {
        const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (chunk * 8 + i < head_dim) address[i].bits = static_cast<uint16_t>(pairs[i / 2] >> (i % 2 * 16));
        }
      }
    }
  }
}

}  // namespace jax_flash::sm80
