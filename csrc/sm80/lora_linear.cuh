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
  using Grad = Product<T, 2, kBlockR / 16, true, true>;

  Shared<kStages>& shared;
  const KernelParams& p;
  Loader<kStages, kBackward> loader{shared, p};
  uint32_t source = 0;  // the stage that is multiplied next

  Sums sums;
  float totals[Grad::kRows][4];  // of a gradient's columns, over tokens

  // Whether the columns' own sums are wanted, with the first ranks.
  __device__ bool adds_up(const Item& item) const {
    return item.work == Work::kGradientB && item.rank == 0 && p.part[item.part].dB.sums != nullptr;
  }

  __device__ __forceinline__ void run() {
    loader.serve();
    int left = 0;  // steps of the item
    for (int number = 0;;) {
      const Item& item = loader.at(number);
      const Work work = loader.work_of(number);
      if (work == Work::kEnd) return;
      if (left == 0) {
        left = loader.steps_of(number);
        clear();
      }
      const int count = min(left, loader.free_steps());
      if (work == Work::kShrink) {
        multiply<Low>(count, warp() * 32, 0);
      } else if (!kBackward || work == Work::kTile) {
        multiply<Tile>(count, warp() % 4 * 64, warp() / 4 * 64);
      } else if constexpr (kBackward) {
        if (uniform(adds_up(item))) multiply<Grad, true>(count, warp() * 32, 0);
        else multiply<Grad>(count, warp() * 32, 0);
      }
      left -= count;
      loader.advance(count);
      if (left == 0) {
        finish(item, work);
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
    if constexpr (kBackward) {
      for (auto& four : totals) {
#pragma unroll
        for (float& total : four) total = 0;
      }
    }
  }

  // Steps of the stages from `source` on; each copies one.
  template <typename P, bool kAddsUp = false>
  __device__ __forceinline__ void multiply(int steps, int row, int col) {
    P product(loader.stages(), row, col);
    product.read(0, source, 0);
#pragma unroll 1
    for (; steps > 0; --steps) {
      product.read(1, source, 1);
      product.template multiply<0, P::kRows / 2>(sums, 0);
      loader.copy();
      product.template multiply<P::kRows / 2, P::kRows>(sums, 0);
      if constexpr (kAddsUp) product.add_up(totals, 0);
      ptx::async_copies_wait<kStages - 2>();
      __syncthreads();
      source = loader.after(source);
      product.read(0, source, 0);
      product.template multiply<0, P::kRows>(sums, 1);
      if constexpr (kAddsUp) product.add_up(totals, 1);
    }
  }

  __device__ __forceinline__ void finish(const Item& item, Work work) {
    const Part& part = p.part[uniform(item.part)];
    if (work == Work::kShrink) {
      scale_by(sums, *part.scale);
      store_rows<T, Low>(sums, part.low, item.row + warp() * 32, item.rank, p.M, part.r);
      raise(item.raises);
    } else if (kBackward && work != Work::kTile) {
      finish_gradient(item, work == Work::kGradientA ? part.dA : part.dB, part.r);
    } else {
      const int row = item.row + warp() % 4 * 64, col = item.col + warp() / 4 * 64;
      if constexpr (!kBackward) add_bias<Tile>(sums, part, col);
      store_rows<T, Tile>(sums, part.out, row, col, p.M, part.cols);
    }
  }

  // Slices are added up in order, so that the bits are always the same: each adds to what the one before left, and the last one
  // has the whole sum.
  __device__ __forceinline__ void finish_gradient(const Item& item, const Gradient& g, int r) {
    float4* partial = reinterpret_cast<float4*>(g.partial + int64_t{item.col} * p.rank + item.rank * kBlockM) + threadIdx.x;
    const int bits = uniform(item.bits);
    if (!(bits & work::kFirst)) {
      if (threadIdx.x == 0) ptx::flag_wait(p.flags + item.raises - p.chain_flags, shared.mark);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kGradSums; ++i) {
        const float4 before = __ldcg(partial + i * kThreads);
        float(&own)[4] = sums.of[i];
        own[0] += before.x;
        own[1] += before.y;
        own[2] += before.z;
        own[3] += before.w;
      }
    }
    if (uniform(adds_up(item))) finish_totals(item, g, p.part[item.part].bias_dtype);
    if (bits & work::kLast) return store_gradient(item, g, r);
#pragma unroll
    for (int i = 0; i < kGradSums; ++i) {
      const float(&own)[4] = sums.of[i];
      __stcg(partial + i * kThreads, make_float4(own[0], own[1], own[2], own[3]));
    }
    raise(item.raises);
  }
  static constexpr int kGradSums = Grad::kRows * 2 * Grad::kCols;

  // The columns' own sums, which the first lane of each four has.
  __device__ __forceinline__ void finish_totals(const Item& item, const Gradient& g, DType dtype) const {
    if (threadIdx.x % 4 != 0) return;
#pragma unroll
    for (int i = 0; i < 2 * Grad::kRows; ++i) {
      const int col = item.col + warp() * 32 + i * 8 + threadIdx.x % 32 / 4;
      float total = totals[i / 2][i % 2 * 2];
      if (!(item.bits & work::kFirst)) total += __ldcg(g.sums_partial + col);
      if (!(item.bits & work::kLast)) {
        __stcg(g.sums_partial + col, total);
      } else if (col < g.cols) {
        store_as(g.sums, dtype, col, total);
      }
    }
  }

  __device__ __forceinline__ void store_gradient(const Item& item, const Gradient& g, int r) const {
    if (g.out == nullptr) return;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kGradSums; ++i) {
      const int col = item.col + warp() * 32 + i / (2 * Grad::kCols) * 16 + lane / 4;
      const int rank = item.rank + i % (2 * Grad::kCols) * 8 + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const int c = col + k / 2 * 8, own = rank + k % 2;
        if (c < g.cols && own < r) store_as(g.out, p.factor_dtype, c * g.stride_col + own * g.stride_rank, sums.of[i][k]);
      }
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
__device__ __forceinline__ void run_kernel(const KernelParams& p) {
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

#ifdef __CUDA_ARCH__
constexpr int kCapability = __CUDA_ARCH__ / 10;
#else
constexpr int kCapability = 90;
#endif

template <int kStages, int kBlockR, typename T, bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) lora_linear_kernel(const __grid_constant__ KernelParams p) {
  if constexpr (has_kernels(kStages, kCapability)) run_kernel<kStages, kBlockR, T, kBackward>(p);
}

}  // namespace fused_lora::sm80
