// Stage matrices from skew-symmetric parameters in one launch, and the gradient. A block of threads
// has a few whole groups: it computes the Cayley transform of all of their blocks and then composes
// them, so that no other block of threads has to be waited for. Teams (cayley.cuh) are a warp at
// most.
#pragma once

#include "cayley.cuh"
#include "compose.cuh"

namespace boft::cuda {

// Calls body(block, active) for every butterfly block of the slab's groups, a team for each.
// `block` is its index among the blocks of all factors. Every team makes the same number of calls,
// because all of its threads take part in barriers; `active` is false if no block is left for a
// team.
template <int B, class F>
__device__ void for_each_block(const Butterfly& f, const Slab& s, int team, F body) {
  const int per_group = f.size / f.b, per_factor = s.groups * per_group;
  for (int done = 0; done < f.n * per_factor; done += kTeams<B>) {
    const int at = done + team, rest = at % per_factor;
    const bool active = at < f.n * per_factor;
    const int64_t block =
        at / per_factor * f.n_blocks + f.block(s.first + rest / per_group, rest % per_group);
    body(active ? block : 0, active);
    sync_team<B>();  // before the next call writes where this one reads
  }
}

// Computes blocks (n, n_blocks, b, b) and stages (groups, size, size); arguments as in
// boft::cuda::stage_from_skew. A block of threads has `groups` groups; B is the size of a team.
template <class W, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>, 4)
    stage_from_skew_kernel(const W* skew, const bool* drop, W* blocks, W* stages, Butterfly f,
                    int groups) {
  const Slab s = slab_of(f, groups, f.size);
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  auto& shared = *reinterpret_cast<CayleyShared<B>*>(shared_memory());
  for_each_block<B>(f, s, team, [&](int64_t block, bool active) {
    const bool dropped = active && drop != nullptr && drop[block];
    cayley_block<B>(shared, team, unknown(lane), skew + block * (f.b * (f.b - 1) / 2), dropped,
                    blocks + block * f.b * f.b, f.b, active);
  });
  __syncthreads();  // compose_slab reads blocks that other threads have written
  compose_slab(reinterpret_cast<W*>(shared_memory()), blocks, stages, f, s);
}

// Computes skew_grad; arguments as in boft::cuda::stage_from_skew_backward. blocks_grad is scratch memory
// for the gradients of the blocks, `columns` the width of a slab.
template <class W, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>, 4)
    stage_from_skew_backward_kernel(const W* blocks, const bool* drop, const W* grad, W* blocks_grad,
                             W* skew_grad, Butterfly f, int64_t splits, int groups,
                             Divisor columns) {
  const Slab s = slab_of(f, groups, columns);
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  compose_backward_slabs(reinterpret_cast<W*>(shared_memory()), blocks, grad, blocks_grad, f, s,
                         splits);
  auto& shared = *reinterpret_cast<CayleyBackwardShared<B, W>*>(shared_memory());
  for_each_block<B>(f, s, team, [&](int64_t block, bool active) {
    const bool dropped = active && drop != nullptr && drop[block];
    cayley_backward_block<B>(shared.teams[team], lane, blocks + block * f.b * f.b, dropped,
                             blocks_grad + block * f.b * f.b,
                             skew_grad + block * (f.b * (f.b - 1) / 2), f.b, active);
  });
}

}  // namespace boft::cuda
