// y = x W^T + xa B^T + bias of so few rows that reading W is most of it, in two launches that run beside each other:
//
//   shrink   four warps make two ranks of a row's xa. No tensor cores: each row may have an adapter of its own, and A is read once.
//   expand   a cluster makes 64 columns of y, and its blocks share their depth. A block streams its part of W through shared memory,
//            and a warpgroup's tensor cores multiply it by x, transposed, so that W's rows fill their 64. Other warps finish
//            some of the columns: they await the other launch, make xa B^T while W is read, and then add up what the blocks have
//            summed, in a fixed order.
#include <algorithm>
#include <atomic>

#include "../shared_memory.h"
#include "few_rows_expand.cuh"
#include "few_rows_shrink.cuh"
#include "launch.cuh"

namespace fused_lora::sm90 {
namespace {

// Of a block that has an SM for itself: more than half of it, so that no two share one while another SM has none. More stages take no less
// time, and what comes beside W waits behind what is asked for.
constexpr int kWholeMemory = 136 * 1024, kHalfMemory = 108 * 1024;

// A kernel and how it is launched: one block an SM, or two.
template <typename T, int kRows, int kShares, int kBlocks>
struct Expand {
  static constexpr auto kKernel = expand_few_rows_kernel<T, kRows, kShares>;
  static constexpr int kStages = ExpandShared<kRows>::stages_in(kBlocks == 1 ? kWholeMemory : kHalfMemory);

  cudaLaunchAttribute attributes[2] = {};
  cudaLaunchConfig_t config{};

  Expand(const FewRows& p, cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {kShares, 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;  // beside the launch before it
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = ceil_div(p.N, kColumns) * kShares;
    config.blockDim = kExpandThreads;
    config.dynamicSmemBytes = ExpandShared<kRows>::bytes(kStages);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = p.r > 0 ? 2 : 1;
  }

  // That the card runs at once, which need not take all SMs. Asked for once a device, since it takes the host as long as a launch.
  cudaError_t clusters(int* count) const {
    constexpr int kDevices = 64;
    static std::atomic<int> known[kDevices];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess && device < kDevices && (*count = known[device].load()) > 0) return error;
    if (error == cudaSuccess) error = allow_shared_memory<kKernel>(static_cast<int>(config.dynamicSmemBytes));
    if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(count, kKernel, &config);
    *count = std::max(*count, 1);
    if (error == cudaSuccess && device < kDevices) known[device].store(*count);
    return error;
  }

  cudaError_t launch(const FewRows& p) const { return cudaLaunchKernelEx(&config, kKernel, p, kStages); }
};

// How many steps a card takes one after another that runs so many clusters at once.
int steps_of(const FewRows& p, int shares, int clusters) {
  constexpr int kEnds = 4;  // what a block takes beside its steps, in steps
  return ceil_div(ceil_div(p.N, kColumns), clusters) * (ceil_div(boxes_of(p.K), shares) + kEnds);
}

// Two blocks an SM where one leaves work for later: one ends while the other goes on.
template <typename T, int kRows, int kShares>
cudaError_t launch_shares(const FewRows& p, int clusters, cudaStream_t stream) {
  if (ceil_div(p.N, kColumns) > clusters) return Expand<T, kRows, kShares, 2>(p, stream).launch(p);
  return Expand<T, kRows, kShares, 1>(p, stream).launch(p);
}

// With the depth shared by as many blocks as take the fewest steps.
template <typename T, int kRows>
cudaError_t launch_expand(const FewRows& p, cudaStream_t stream) {
  int by_2 = 0, by_4 = 0, by_8 = 0;
  cudaError_t error = Expand<T, kRows, 2, 1>(p, stream).clusters(&by_2);
  if (error == cudaSuccess) error = Expand<T, kRows, 4, 1>(p, stream).clusters(&by_4);
  if (error == cudaSuccess) error = Expand<T, kRows, 8, 1>(p, stream).clusters(&by_8);
  if (error != cudaSuccess) return error;
  const int steps[3] = {steps_of(p, 2, by_2), steps_of(p, 4, by_4), steps_of(p, 8, by_8)};
  if (steps[0] <= std::min(steps[1], steps[2])) return launch_shares<T, kRows, 2>(p, by_2, stream);
  return steps[1] <= steps[2] ? launch_shares<T, kRows, 4>(p, by_4, stream) : launch_shares<T, kRows, 8>(p, by_8, stream);
}

template <typename T>
cudaError_t launch_part(const FewRows& p, cudaStream_t stream) {
  if (p.r > 0) {
    // A row may have fewer ranks than a window.
    const int blocks_of_row = std::min(ceil_div(p.r, kBlockRanks), std::max(2, kFewRows / p.M));
    const int blocks = p.levels() * (p.M * blocks_of_row + (p.segmented() ? kFewRows - p.M : 0));
    shrink_few_rows_kernel<T><<<blocks, 32 * kShrinkWarps, 0, stream>>>(p, blocks_of_row);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
  }
  if (p.M <= 16) return launch_expand<T, 16>(p, stream);
  return p.M <= 32 ? launch_expand<T, 32>(p, stream) : launch_expand<T, 64>(p, stream);
}

const uint16_t* elements(const Operand& matrix) { return static_cast<const uint16_t*>(matrix.data); }

FewRows few_rows_of(const ForwardParams& f, const ForwardPart& part, MapMaker& map) {
  FewRows p{};
  p.x_map = map(f.x, f.x.rows <= 16 ? 16 : f.x.rows <= 32 ? 32 : 64);
  p.weight_map = map(part.weight);
  p.x = elements(f.x);
  p.down = elements(part.A);
  p.up = elements(part.B);
  p.low = static_cast<uint16_t*>(part.xa.data);
  p.y = static_cast<uint16_t*>(part.y.data);
  p.x_stride = f.x.stride;
  p.down_stride = part.A.stride;
  p.up_stride = part.B.stride;
  p.low_stride = part.xa.stride;
  p.M = static_cast<int>(f.x.rows);
  p.N = static_cast<int>(part.weight.rows);
  p.K = static_cast<int>(f.x.cols);
  p.r = static_cast<int>(work::ranks_of(f.window, part.A));
  p.scale = part.scale;
  p.gain = part.gain;
  p.bias = part.bias.data;
  p.bias_dtype = part.bias.format;
  p.segments = part.segments;
  return p;
}

}  // namespace

bool takes_few_rows(int64_t M, int64_t N, int64_t K, int64_t r, bool segmented) {
  if (M > kFewRows || N % kChunk != 0 || K % kChunk != 0) return false;
  // Rows that share A read it one by one, out of L2: no more than W, or than takes no time beside a launch.
  constexpr int64_t kNoTime = 4 << 20;
  return segmented || (r % kChunk == 0 && M * r <= std::max(N, kNoTime / K));
}

cudaError_t launch_few_rows(const ForwardParams& f, cudaStream_t stream) {
  for (int i = 0; i < f.parts; ++i) {
    MapMaker map;
    const FewRows p = few_rows_of(f, f.part[i], map);
    if (map.error != cudaSuccess) return map.error;
    const cudaError_t error = f.x.format == DType::kBFloat16 ? launch_part<__nv_bfloat16>(p, stream) : launch_part<__half>(p, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace fused_lora::sm90
