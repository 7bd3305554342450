#include "cpu/pages.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/parallel.h"
#include "cpu/plan.h"

namespace jax_flash::cpu {
namespace {

// Rows [row_begin, row_end), of all heads of sequence b, against the positions [begin, end) that one of them sees.
struct Block {
  int32_t b;
  int64_t row_begin, row_end;
  int32_t begin, end;
  // The positions are divided into so many pieces. With more than one, each leaves its share of the rows, `stride`
  // floats on from the last, for combine().
  int64_t pieces;
  float* shares;
  int64_t stride;
};

struct Piece {
  int64_t block;
  int32_t begin, end;
  float* share;  // null where the block has no other piece
};

// What each thread needs: a chunk of positions, its rows' share, and the kernel's scratch.
struct Memory {
  int32_t chunk;  // positions
  int64_t k_bytes, share_bytes, kernel_bytes;

  int64_t bytes() const { return 2 * k_bytes + share_bytes + kernel_bytes; }
};

struct PagesPlan {
  std::vector<Block> blocks;
  std::vector<Piece> pieces;
  std::unique_ptr<float[]> shares;
  int64_t workers;
  Memory memory;
};

int64_t div_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t align_up(int64_t bytes) { return div_up(bytes, 64) * 64; }

void add_blocks(const KvcacheParams& params, int32_t b, const CacheSequence& sequence, int64_t block_rows,
                std::vector<Block>& blocks) {
  const int64_t rows = static_cast<int64_t>(params.T) * params.G, G = params.G;
  for (int64_t row = (rows - 1) / block_rows * block_rows; row >= 0; row -= block_rows) {
    const int64_t row_end = std::min(rows, row + block_rows);
    const int32_t end = std::max(0, sequence.key_end(static_cast<int32_t>((row_end - 1) / G)));
    const int32_t begin = std::min(end, sequence.key_begin(static_cast<int32_t>(row / G)));
    blocks.push_back({b, row, row_end, begin, end, 1, nullptr, params.K * (row_end - row) * partial_stride(params.H)});
  }
}

// Divides the blocks into pieces of at most this many positions.
void add_pieces(int64_t most, PagesPlan& plan) {
  int64_t floats = 0;
  for (Block& block : plan.blocks) {
    block.pieces = std::max<int64_t>(1, div_up(block.end - block.begin, most));
    if (block.pieces > 1) floats += block.pieces * block.stride;
  }
  if (floats > 0) plan.shares.reset(new float[floats]);
  float* shares = plan.shares.get();
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    Block& block = plan.blocks[i];
    if (block.pieces == 1) {
      plan.pieces.push_back({static_cast<int64_t>(i), block.begin, block.end, nullptr});
      continue;
    }
    block.shares = shares;
    for (int64_t begin = block.begin; begin < block.end; begin += most, shares += block.stride) {
      const int64_t end = std::min<int64_t>(block.end, begin + most);
      plan.pieces.push_back({static_cast<int64_t>(i), static_cast<int32_t>(begin), static_cast<int32_t>(end), shares});
    }
  }
}

PagesPlan plan_pages(const KvcacheParams& params, const Kernels& kernels, const std::vector<CacheSequence>& sequences,
                     const ForwardParams& forward, int64_t threads) {
  const int64_t K = params.K, rows = static_cast<int64_t>(params.T) * params.G;
  const int64_t k_bytes = K * params.H * element_size(params.dtype);  // of a position
  const bool few = rows <= kernels.few_rows;
  const int64_t target = target_tasks(threads);
  const int64_t block_rows = few ? rows : rows_of_task(rows, params.B, params.H, target);
  PagesPlan plan;
  for (int32_t b = 0; b < params.B; ++b) add_blocks(params, b, sequences[b], block_rows, plan.blocks);
  int64_t positions = 0;
  for (const Block& block : plan.blocks) positions += block.end - block.begin;
  plan.workers = std::min(threads, worthwhile_workers(Shape{1, K, 1, 1, 1, params.H}, block_rows, positions));

  // A few rows read a chunk once: it has to be in a cache near the core. Many read it often, and pass their shares on
  // to the next chunk, which is to be little beside the products.
  Memory& memory = plan.memory;
  const int64_t unit = few ? 32 : kKeyUnit, most = few ? kKeyUnit : 4 * kKeyUnit;
  const int64_t bytes = few ? 512 * 1024 : 4 * 1024 * 1024;
  const int64_t chunk = std::clamp(bytes / (2 * k_bytes) / unit * unit, unit, most);
  memory.chunk = static_cast<int32_t>(chunk);
  memory.k_bytes = align_up(chunk * k_bytes);
  memory.share_bytes = align_up(K * block_rows * partial_stride(params.H) * static_cast<int64_t>(sizeof(float)));
  // The last rows may be so few that the kernels take them another way.
  const int64_t last_rows = rows - (rows - 1) / block_rows * block_rows;
  memory.kernel_bytes =
      std::max(kernels.forward_scratch(forward, K, block_rows), kernels.forward_scratch(forward, K, last_rows));

  const bool enough = static_cast<int64_t>(plan.blocks.size()) >= target;
  add_pieces(enough ? kMaxLength : std::max<int64_t>(1, div_up(div_up(positions, target), chunk)) * chunk, plan);
  return plan;
}

// Copies positions [begin, end) of sequence b, of all heads, from their pages to k and v.
void gather(const KvcacheParams& params, int32_t b, const CacheSequence& sequence, int32_t begin, int32_t end, char* k,
            char* v) {
  const int64_t row = static_cast<int64_t>(params.K) * params.H * element_size(params.dtype);
  for (int32_t j = begin; j < end;) {
    const int32_t next = std::min(end, (j / params.S + 1) * params.S);
    const int64_t position = cache_position(params, sequence.row, cache_place(params, b, j)), bytes = (next - j) * row;
    if (position < 0) {
      std::memset(k, 0, bytes);
      std::memset(v, 0, bytes);
    } else {
      std::memcpy(k, static_cast<const char*>(params.k_cache) + position * row, bytes);
      std::memcpy(v, static_cast<const char*>(params.v_cache) + position * row, bytes);
    }
    k += bytes;
    v += bytes;
    j = next;
  }
}

// The rows of a block against positions [begin, end), which k and v hold: a sequence of its own, in which the band
// keeps its place.
ForwardParams chunk_params(const ForwardParams& forward, const Block& block, const DiagonalBand& band, int32_t begin,
                           int32_t end, const char* k, const char* v) {
  ForwardParams chunk = forward;
  chunk.shape.B = 1;
  chunk.shape.S = end - begin;
  chunk.band.top_left = true;
  chunk.band.left = begin - band.first;
  chunk.band.right = band.last - begin;
  chunk.q = static_cast<const char*>(forward.q) +
            block.b * forward.shape.T * forward.shape.N() * forward.shape.H * element_size(forward.dtype);
  chunk.k = k;
  chunk.v = v;
  return chunk;
}

void combine_rows(const ForwardParams& forward, const Kernels& kernels, const Block& block, int64_t kh,
                  const float* shares) {
  const int64_t stride = partial_stride(forward.shape.H), rows = block.row_end - block.row_begin;
  for (int64_t r = 0; r < rows; ++r) {
    kernels.combine(forward,
                    {block.b, kh, block.row_begin + r, shares + (kh * rows + r) * stride, block.pieces, block.stride});
  }
}

void attend_to_piece(const KvcacheParams& params, const Kernels& kernels, const CacheSequence& sequence,
                     const ForwardParams& forward, const Memory& memory, const Block& block, const Piece& piece,
                     char* scratch) {
  char *k = scratch, *v = k + memory.k_bytes, *share_at = v + memory.k_bytes,
       *kernel_at = share_at + memory.share_bytes;
  float* share = piece.share ? piece.share : reinterpret_cast<float*>(share_at);
  int32_t begin = piece.begin;
  do {  // once at least, for what rows that see nothing leave
    const int32_t end = std::min(piece.end, (begin / memory.chunk + 1) * memory.chunk);
    gather(params, block.b, sequence, begin, end, k, v);
    kernels.forward(chunk_params(forward, block, sequence.band, begin, end, k, v),
                    {0, 0, params.K, block.row_begin, block.row_end, 0, div_up(memory.chunk, kKeyUnit) * kKeyUnit,
                     share, begin > piece.begin},
                    kernel_at);
    begin = end;
  } while (begin < piece.end);
  if (piece.share) return;
  for (int64_t kh = 0; kh < params.K; ++kh) combine_rows(forward, kernels, block, kh, share);
}

}  // namespace

void attend_to_pages(const KvcacheParams& params, const Kernels& kernels, const std::vector<CacheSequence>& sequences,
                     const void* q, Executor& executor) {
  ForwardParams forward{};
  forward.dtype = params.dtype;
  forward.shape = Shape{params.B, params.K, params.G, params.T, kKeyUnit, params.H};
  forward.score = params.score;
  forward.sinks = params.sinks;
  forward.q = q;
  forward.o = params.o;
  forward.lse = params.lse;
  const PagesPlan plan = plan_pages(params, kernels, sequences, forward, executor.num_threads());
  parallel_for(executor, plan.workers, plan.pieces.size(), plan.memory.bytes(), [&](int64_t task, void* scratch) {
    const Piece& piece = plan.pieces[task];
    const Block& block = plan.blocks[piece.block];
    attend_to_piece(params, kernels, sequences[block.b], forward, plan.memory, block, piece,
                    static_cast<char*>(scratch));
  });
  if (!plan.shares) return;
  parallel_for(executor, plan.workers, plan.blocks.size() * params.K, 0, [&](int64_t task, void*) {
    const Block& block = plan.blocks[task / params.K];
    if (block.shares) combine_rows(forward, kernels, block, task % params.K, block.shares);
  });
}

}  // namespace jax_flash::cpu
