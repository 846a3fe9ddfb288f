// Reads passes from standard input, a line each: "M backward drops wants_out gated block_n clusters parts summed", then for each part "cols depth r
// wants_dA wants_dB reads_y stored". Writes for each one line: what the plan and its kernel say, then the items.
#include <cstdio>

#include "../../csrc/sm90/tiling.cuh"
#include "print_items.h"

using namespace fused_lora::sm90;
using fused_lora::kMostParts;
using fused_lora::work::Plan;

template <typename C>
void list(const Pass& pass, int clusters) {
  const Plan plan = fused_lora::work::make_plan(pass, tiling_of<C>(clusters));
  std::printf("%d %d %d %lld %d ", plan.low_flags, plan.chain_flags, plan.flags, static_cast<long long>(plan.partials), plan.finish_spacing);
  std::printf("%d %d %d %d %d %d %d %d ", plan.tiling.tile_cols, plan.tiling.gradient_cols, C::kStages, C::kBlockN / kBox,
              C::kTileCols / kBox, boxes_of(C::kBlockR), C::kShrinkHalves, C::kGradientBlocks);
  const auto& ring = plan.ring;
  std::printf(";%d %d %d %d %d %d %lld %lld ;", ring.tiles, ring.of_tile, ring.pieces, ring.ready, ring.ready_stride, ring.done,
              static_cast<long long>(ring.bytes), static_cast<long long>(fused_lora::work::ring_stride(pass, ring, C::kBlockN)));
  print_items(plan.items);
}

template <int kBlockN>
void list_tiles(const Pass& pass, int clusters) {
  const auto call = [&](auto config) { list<decltype(config)>(pass, clusters); };
  const int rank = fused_lora::work::block_rank(pass.most_rank());
  if (!pass.gated) return with_rank<kBlockN, Epilogue::kPlain>(rank, call);
  pass.backward ? with_rank<kBlockN, Epilogue::kGateGrad>(rank, call) : with_rank<kBlockN, Epilogue::kGate>(rank, call);
}

int main() {
  long long M;
  int backward, drops, out, gated, block_n, clusters, parts, summed;
  while (std::scanf("%lld %d %d %d %d %d %d %d %d", &M, &backward, &drops, &out, &gated, &block_n, &clusters, &parts, &summed) == 9) {
    Pass pass{M, backward != 0, drops != 0, out != 0, gated != 0, parts, summed, {}};
    for (int i = 0; i < parts; ++i) {
      long long cols, depth, r;
      int dA, dB, y, stored;
      if (std::scanf("%lld %lld %lld %d %d %d %d", &cols, &depth, &r, &dA, &dB, &y, &stored) != 7) return 1;
      pass.part[i] = {cols, depth, r, dA != 0, dB != 0, y != 0, stored != 0};
    }
    block_n == 256 ? list_tiles<256>(pass, clusters) : list_tiles<128>(pass, clusters);
  }
}
