// What the two thread blocks of a pair do together (head dims above 128): they take key blocks, exchange dS, and share
// the columns of dQ. See backward_split_roles.cuh.
#pragma once

#include "cuda/ptx/ordered.cuh"
#include "cuda/sm90/backward/dq_semaphore.cuh"
#include "cuda/sm90/backward/tile.cuh"
#include "cuda/sm90/backward/work_queue.cuh"

namespace jax_flash::sm90 {

template <class C>
struct alignas(1024) SplitRolesShared {
  using Row = typename C::T[kPanelColumns];
  Row k[C::kPanels][C::kN];  // later dK
  Row v[C::kPanels][C::kN];  // later dV
  Row k_peer[2][C::kN];      // the other block's K, the columns of this block's dQ
  Row q[C::kStages][C::kPanels][C::kM];
  Row d_o[C::kStages][C::kPanels][C::kM];
  // dSᵀ, a row is a key. Before it the same bytes carry Pᵀ, [warp][four words][lane]: a warp of the dS warpgroup reads
  // its P from where it then stores its dS.
  Row ds[C::kN];
  Row ds_peer[C::kN];  // the other block's
  float minus_delta[C::kStages][C::kM];
  uint64_t k_full, v_full, k_peer_full;
  uint64_t q_full[C::kStages], q_empty[C::kStages];
  uint64_t do_full[C::kStages], do_empty[C::kStages];
  uint64_t q_raw[C::kStages], do_raw[C::kStages];  // the same where rows are to be cleared first: see clear_all
  uint64_t ds_peer_full;                           // dS of the other block has come
  uint64_t ds_sent;                                // dS has come to the other block
  uint64_t ds_sent_free;                           // the other block has read the dS that was sent to it
  uint64_t keys_empty;                             // dK and dV have left the buffers of K and V
  // The pair's next key block, from its first block's producer to the other's.
  uint64_t ticket_full, ticket_empty;
  uint32_t ticket;
  WorkQueue<C> queue;
};

// The consumers wait for each other. They come here from different code, and synccheck takes one barrier that is waited
// for at two places to be diverged: so each waits at a barrier of its own. The P warpgroup waits last, so that it
// cannot arrive a second time before the dS warpgroup has seen the first.
template <class C>
__device__ __forceinline__ void meet_consumers(int w) {
  if (w == 0) {
    ptx::named_barrier_arrive(kScoresHere, C::kConsumers);
    ptx::named_barrier_sync(kGradientsHere, C::kConsumers);
  } else {
    ptx::named_barrier_sync(kScoresHere, C::kConsumers);
    ptx::named_barrier_arrive(kGradientsHere, C::kConsumers);
  }
}

// Where a block stands in its pair, and the products of its share of dQ.
template <class C>
struct PairedDq {
  const BackwardArguments& args;
  SplitRolesShared<C>& shared;
  const BackwardWork<C>& work;
  int w, thread;
  uint32_t rank;
  int panel;  // of dQ, that this consumer computes
  uint64_t ds, ds_peer, keys, keys_peer;
  DqSemaphore semaphore;

  __device__ __forceinline__ PairedDq(const BackwardArguments& args, SplitRolesShared<C>& shared,
                                      const BackwardWork<C>& work, int w, int thread)
      : args(args), shared(shared), work(work), w(w), thread(thread), rank(ptx::cluster_block_rank()) {
    constexpr auto kSwizzle = ptx::Swizzle::k128Bytes;
    panel = 2 * static_cast<int>(rank) + w;
    ds = ptx::wgmma_descriptor(shared.ds, kSwizzle, 0);
    ds_peer = ptx::wgmma_descriptor(shared.ds_peer, kSwizzle, 0);
    // A head dim of 192 has no fourth panel: computed from the third, and not added.
    keys = ptx::wgmma_descriptor(shared.k[min_i32(panel, C::kPanels - 1)], kSwizzle, 0);
    keys_peer = ptx::wgmma_descriptor(shared.k_peer[w], kSwizzle, 0);
    semaphore = DqSemaphore::make<C>(args, work);
  }

  // One lane of each of the dS warpgroup's warps, once the warp has stored its 16 keys of dS of tile `tile` and fenced.
  __device__ __forceinline__ void send_ds(int32_t tile) {
    const int row = thread / 32 * 16;
    if (thread == 0) ptx::mbarrier_arrive_expect(&shared.ds_peer_full, sizeof(shared.ds_peer));
    ptx::mbarrier_wait(&shared.ds_sent_free, tile & 1 ^ 1);
    ptx::bulk_copy_to_block(ptx::cluster_address(ptx::shared_address(shared.ds_peer[row]), rank ^ 1), shared.ds[row],
                            sizeof(shared.ds_peer) / 4,
                            ptx::cluster_address(ptx::shared_address(&shared.ds_peer_full), rank ^ 1));
  }

  // Leaves nothing in flight. kFreesDs: tells the P warpgroup, before the additions, that dS has been read.
  template <bool kFreesDs>
  __device__ __forceinline__ void add(const BackwardStep& done) {
    float dq[32];
    issue_query_gradient<C>(dq, ds, keys);
    ptx::mbarrier_wait(&shared.ds_peer_full, done.tile & 1);
    issue_query_gradient<C, false, true>(dq, ds_peer, keys_peer);
    ptx::wgmma_wait<0>();
    ptx::fence_operand(dq);
    if (thread % 32 == 0) ptx::mbarrier_arrive_cluster(&shared.ds_sent_free, rank ^ 1);
    if constexpr (kFreesDs) {
      if (thread == 0) ptx::mbarrier_wait(&shared.ds_sent, done.tile & 1);
      __syncwarp();
      ptx::named_barrier_arrive(kDsFree, C::kConsumers);
    }

    if (args.deterministic) {
      // What was added to the tile before is complete by now.
      const bool first = done.m == work.tiles.begin;  // of its query head
      if (done.index > 0) pass_on(first ? work.tiles.end - 1 : done.m - 1, first ? done.g - 1 : done.g);
      if (thread == 0) semaphore.wait<C>(args, work, done.m, done.g, rank);
      ptx::named_barrier_sync(kWarpgroup + w, 128);
    }
    if (panel < C::kPanels) {
      float* gDq = dq_part<C>(args, work, done.m, done.g, panel) + thread * 4;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        ptx::red_add_v4(gDq + i * 512, dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
      }
    }
  }

  // Deterministic sums: both consumers' additions to this tile are complete, and the next key block may add.
  __device__ __forceinline__ void pass_on(int32_t m, int32_t g) {
    __threadfence();
    if (w == 0) {
      ptx::named_barrier_arrive(kDqAdded, C::kConsumers);
    } else {
      ptx::named_barrier_sync(kDqAdded, C::kConsumers);
      if (thread == 0) semaphore.release<C>(args, work, m, g, rank);
    }
  }

  // After the last tile of a ticket.
  __device__ __forceinline__ void pass_on_last() {
    if (!args.deterministic) return;
    meet_consumers<C>(w);
    pass_on(work.tiles.end - 1, static_cast<int32_t>(args.shape.G) - 1);
  }
};

// The pair's ticket of round `round`: the first block's producer takes it, the other's is told.
template <class C>
__device__ __forceinline__ int32_t take_ticket(const BackwardArguments& args, SplitRolesShared<C>& shared,
                                               int32_t round, int32_t rank) {
  if (rank == 0) {
    const uint32_t ticket = ptx::fetch_add(args.workspace.next_block, 1);
    ptx::mbarrier_wait(&shared.ticket_empty, round & 1 ^ 1);
    ptx::store_to_block(ptx::cluster_address(ptx::shared_address(&shared.ticket), 1), ticket,
                        ptx::cluster_address(ptx::shared_address(&shared.ticket_full), 1));
    return static_cast<int32_t>(ticket);
  }
  ptx::mbarrier_arrive_expect(&shared.ticket_full, sizeof(shared.ticket));
  ptx::mbarrier_wait(&shared.ticket_full, round & 1);
  const uint32_t ticket = shared.ticket;
  ptx::mbarrier_arrive_cluster(&shared.ticket_empty, 0);
  return static_cast<int32_t>(ticket);
}

// A thread that does nothing else tells the other block that its dS has come.
template <class C>
__device__ __forceinline__ void acknowledge_all(SplitRolesShared<C>& shared) {
  const uint32_t other = ptx::cluster_block_rank() ^ 1;
  int32_t tile = 0;
  for (int32_t round = 0;; ++round) {
    const int32_t count = shared.queue.wait(round).count;
    shared.queue.end(round);
    if (count < 0) return;
    for (const int32_t end = tile + count; tile < end; ++tile) {
      ptx::mbarrier_wait(&shared.ds_peer_full, tile & 1);
      ptx::mbarrier_arrive_cluster(&shared.ds_sent, other);
    }
  }
}

}  // namespace jax_flash::sm90
