// From skew-symmetric parameters to stage matrices in one launch: a block of threads transforms the
// blocks of a few whole groups, and then composes them. For teams of a warp at most.
#pragma once

#include "cayley.cuh"
#include "compose.cuh"

namespace boft::cuda {

// Calls f(block among those of all factors, whether there is one) for the blocks of the slab's groups,
// a team at a time; every team makes as many calls.
template <int B, class F>
__device__ void for_each_block(const Butterfly& f, const Slab& s, int team, F body) {
  const int per_group = f.size / f.b, per_factor = s.groups * per_group;
  for (int done = 0; done < f.n * per_factor; done += kTeams<B>) {
    const int at = done + team, rest = at % per_factor;
    const bool there = at < f.n * per_factor;
    const int64_t block =
        at / per_factor * f.n_blocks + f.block(s.first + rest / per_group, rest % per_group);
    body(there ? block : 0, there);
    sync_team<B>();  // before the next call writes where this one reads
  }
}

template <class W, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>, 4)
    rotation_kernel(const W* skew, const bool* drop, W* blocks, W* stages, Butterfly f, int groups) {
  const Slab s = slab_of(f, groups, f.size);
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  auto& shared = *reinterpret_cast<CayleyShared<B>*>(shared_memory());
  for_each_block<B>(f, s, team, [&](int64_t block, bool there) {
    const bool dropped = there && drop != nullptr && drop[block];
    cayley_block<B>(shared, team, unknown(lane), skew + block * (f.b * (f.b - 1) / 2), dropped,
                    blocks + block * f.b * f.b, f.b, there);
  });
  __syncthreads();  // the blocks are read by other threads now
  compose_slab(reinterpret_cast<W*>(shared_memory()), blocks, stages, f, s);
}

// blocks_grad is memory to work in.
template <class W, int B>
__global__ void __launch_bounds__(kCayleyThreads<B>, 4)
    rotation_backward_kernel(const W* blocks, const bool* drop, const W* grad, W* blocks_grad,
                             W* skew_grad, Butterfly f, int64_t splits, int groups,
                             Divisor columns) {
  const Slab s = slab_of(f, groups, columns);
  const int team = int(threadIdx.x) / B, lane = int(threadIdx.x) % B;
  compose_backward_slabs(reinterpret_cast<W*>(shared_memory()), blocks, grad, blocks_grad, f, s,
                         splits);
  auto& shared = *reinterpret_cast<CayleyBackwardShared<B, W>*>(shared_memory());
  for_each_block<B>(f, s, team, [&](int64_t block, bool there) {
    const bool dropped = there && drop != nullptr && drop[block];
    cayley_backward_block<B>(shared.teams[team], lane, blocks + block * f.b * f.b, dropped,
                             blocks_grad + block * f.b * f.b,
                             skew_grad + block * (f.b * (f.b - 1) / 2), f.b, there);
  });
}

}  // namespace boft::cuda
