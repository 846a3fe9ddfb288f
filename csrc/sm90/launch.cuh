// From a pass's parameters to its kernel: which tiles, which list of work, which grid.
#pragma once

#include <type_traits>

#include "../lora_linear.h"
#include "lora_linear.cuh"

namespace fused_lora::sm90 {

// Clusters that run at once on the current device; 0 if it cannot be asked.
inline int clusters_at_once() {
  int device = 0, sms = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return 0;
  if (cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
  return sms / kCluster;
}

inline int ceil_div(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Tiles of 128 columns take 0.56 of the time of those of 256 and fill a wave where there are few.
inline bool wants_narrow_tiles(int64_t M, int64_t N, int64_t r, int clusters) {
  const int64_t row_pairs = ceil_div(M, kPairRows);
  const int wide_waves = ceil_div(row_pairs * ceil_div(N, 256), clusters);
  const int narrow_waves = ceil_div(row_pairs * ceil_div(N, 128), clusters);
  return r <= 128 && 0.56 * narrow_waves < wide_waves;
}

// The list's order was chosen by measurement (docs/hopper.md). A shrink item costs about half a tile: where tiles are long, two
// at a time keep the clusters in step. Short tiles want shrink and gradient items several groups ahead, since those take longer
// than a group.
template <typename C, bool kBackward>
Schedule make_schedule(const KernelParams& p, bool wants_out, bool needs_low, int clusters) {
  Schedule s{};
  s.row_pairs = ceil_div(p.M, kPairRows);
  s.tile_cols = wants_out ? ceil_div(p.N, C::kBlockN) : 0;
  const bool long_tiles = p.K >= 3072;
  // Riding delays the other tiles of the first wave; that is worth it where x is read by few columns of tiles.
  s.rides = C::kCanRide && !kBackward && wants_out && s.tile_cols <= 4;
  s.group_pairs = s.rides ? 32 : 8;
  s.groups = ceil_div(s.row_pairs, s.group_pairs);
  const bool small_groups = s.group_pairs * s.tile_cols < clusters / 2;
  if (needs_low && !s.rides) {
    s.shrink_batch = long_tiles && C::kBlockN == 256 && C::kBlockR <= 128 ? 2 : 1;
    s.shrink_lead = kBackward && small_groups ? 4 : 1;
  }
  s.gradient_lead = kBackward && small_groups ? min(2, max(0, s.shrink_lead - 1)) : 0;
  s.tail = long_tiles ? 0 : 4;
  s.slice_pairs = s.groups == 1 ? 2 : s.group_pairs;
  return s;
}

template <typename C, typename T, bool kBackward>
cudaError_t launch(KernelParams p, bool wants_out, bool needs_low, int clusters, cudaStream_t stream) {
  p.schedule = make_schedule<C, kBackward>(p, wants_out, needs_low, clusters);
  Schedule& s = p.schedule;
  p.flags = 2 + 2 * s.row_pairs;
  if constexpr (kBackward) {
    s.dA_pairs = p.dA.out == nullptr ? 0 : ceil_div(p.dA.cols, kCluster * C::kGradientCols);
    s.dB_pairs = p.dB.out == nullptr ? 0 : ceil_div(p.dB.cols, kCluster * C::kGradientCols);
    p.dA.chain = p.ready + 2 * s.row_pairs;
    p.dB.chain = p.dA.chain + kCluster * kConsumers * s.dA_pairs;
    p.dB.partial = p.dA.partial + int64_t{kCluster} * C::kGradientCols * C::kBlockR * s.dA_pairs;
  }
  int items = 0;
  for (int step = s.first_step(); step < s.last_step(); ++step) items += s.size(step);

  const auto kernel = lora_linear_kernel<C, T, kBackward>;
  constexpr int kSharedBytes = sizeof(Shared<C>);
  static_assert(kSharedBytes <= 232448, "more shared memory than a block can have");
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  kernel<<<kCluster * min(clusters, items), kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <typename T, bool kBackward>
cudaError_t launch_tiles(const KernelParams& p, bool wants_out, bool needs_low, cudaStream_t stream) {
  const int clusters = clusters_at_once();
  if (clusters == 0) return cudaErrorInvalidDevice;
  const bool narrow = wants_narrow_tiles(p.M, p.N, p.r, clusters);
  if (p.r <= 16 && narrow) return launch<Config<128, 16>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  if (p.r <= 16) return launch<Config<256, 16>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  if (p.r <= 64 && narrow) return launch<Config<128, 64>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  if (p.r <= 64) return launch<Config<256, 64>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  if (p.r <= 128 && narrow) return launch<Config<128, 128>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  if (p.r <= 128) return launch<Config<256, 128>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
  return launch<Config<256, 256>, T, kBackward>(p, wants_out, needs_low, clusters, stream);
}

// Tensor maps of one dtype, and the first error among them.
struct MapMaker {
  DType dtype;
  cudaError_t error = cudaSuccess;

  CUtensorMap operator()(const Matrix& matrix, Box box = {}) {
    CUtensorMap map{};
    if (error == cudaSuccess) error = make_tensor_map(matrix, dtype, &map, box);
    return map;
  }
};

}  // namespace fused_lora::sm90
