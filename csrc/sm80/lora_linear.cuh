// One pass of the LoRA linear in one launch: a persistent block an SM, all of whose warps copy, multiply and store. docs/sm80.md
// tells its story.
#pragma once

#include "loader.cuh"
#include "results.cuh"

namespace fused_lora::sm80 {

template <int kStages, int kBlockR, typename T, bool kBackward>
struct Worker {
  using Tile = Product<T, 4, 4, false, kBackward>;
  using Low = Product<T, 2, kBlockR / 16, false, kBackward>;

  Shared<kStages>& shared;
  const KernelParams& p;
  Loader<kStages, kBackward> loader{shared, p};
  uint32_t source = 0;  // the stage that is multiplied next

  Sums sums;

  __device__ __forceinline__ void run() {
    loader.serve();
    int left = 0;  // steps of the item
    for (int number = 0; loader.at(number).work != Work::kEnd;) {
      const Item& item = loader.at(number);
      if (left == 0) {
        left = steps_of(item);
        clear();
      }
      const int count = min(left, loader.free_steps());
      if (item.work == Work::kShrink) {
        multiply<Low>(count, warp() * 32, 0);
      } else {
        multiply<Tile>(count, warp() % 4 * 64, warp() / 4 * 64);
      }
      left -= count;
      loader.advance(count);
      if (left == 0) {
        finish(item);
        ++number;
      }
      loader.serve();
    }
  }

  static __device__ int warp() { return threadIdx.x / 32; }

  __device__ void clear() {
#pragma unroll
    for (auto& four : sums.of) {
#pragma unroll
      for (float& sum : four) sum = 0;
    }
  }

  __device__ int steps_of(const Item& item) const {
    if (item.work == Work::kShrink) return sm80::steps_of(p.part[item.part].depth);
    const int first = kBackward ? 0 : item.part, last = kBackward ? p.summed : item.part + 1;
    int steps = 0;
    for (int i = first; i < last; ++i) steps += sm80::steps_of(p.part[i].depth) + sm80::steps_of(p.part[i].r);
    return steps;
  }

  // Steps of the stages from `source` on; each copies one.
  template <typename P>
  __device__ __forceinline__ void multiply(int steps, int row, int col) {
    P product(row, col);
    product.read(0, loader.stage(source), 0);
#pragma unroll 1
    for (; steps > 0; --steps) {
      product.read(1, loader.stage(source), 1);
      product.multiply(sums, 0);
      loader.copy();
      ptx::async_copies_wait<kStages - 2>();
      __syncthreads();
      source = loader.after(source);
      product.read(0, loader.stage(source), 0);
      product.multiply(sums, 1);
    }
  }

  __device__ __forceinline__ void finish(const Item& item) {
    const Part& part = p.part[item.part];
    if (item.work == Work::kShrink) {
      scale_by(sums, *part.scale);
      store_rows<T, Low>(sums, part.low, item.row + warp() * 32, 0, p.M, part.r);
      raise(item.raises);
    } else {
      const int row = item.row + warp() % 4 * 64, col = item.col + warp() / 4 * 64;
      if constexpr (!kBackward) add_bias<Tile>(sums, part, col);
      store_rows<T, Tile>(sums, part.out, row, col, p.M, part.cols);
    }
  }

  // Tells other blocks that what this one wrote is there.
  __device__ void raise(int flag) {
    __syncthreads();
    if (threadIdx.x == 0) {
      __threadfence();
      ptx::flag_raise(p.flags + flag, shared.mark);
    }
  }
};

template <int kStages, int kBlockR, typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) lora_linear_kernel(const __grid_constant__ KernelParams p) {
  extern __shared__ __align__(128) uint8_t memory[];
  auto& shared = *reinterpret_cast<Shared<kStages>*>(memory);
  if (threadIdx.x == 0) shared.mark = p.counters->launches + 1;
  __syncthreads();
  Worker<kStages, kBlockR, T, kBackward>{shared, p}.run();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(&p.counters->exited, 1) + 1 == static_cast<int>(gridDim.x)) *p.counters = {shared.mark, 0, 0, 0};
  }
}

}  // namespace fused_lora::sm80
