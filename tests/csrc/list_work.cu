// Reads passes from standard input, a line each: "M backward drops wants_out gated block_n clusters parts summed", then for each part "cols depth r
// wants_dA wants_dB". Writes for each one line: of sizes, then of work items, five numbers each, in the order of the list.
#include <cstdio>

#include "../../csrc/sm90/plan.cuh"

using namespace fused_lora::sm90;
using fused_lora::kMostParts;

template <typename C>
void list(const Pass& pass, int clusters) {
  const Schedule s = make_schedule<C>(pass, clusters);
  long long chains = 0, most_chains = 0, floats = 0, most_floats = 0;
  for (int i = 0; i < pass.parts; ++i) {
    const PassPart& part = pass.part[i];
    if (part.wants_dA) chains += chain_flags<C>(part.cols), floats += partial_floats<C>(part.cols);
    if (part.wants_dB) chains += chain_flags<C>(part.depth), floats += partial_floats<C>(part.depth) + partial_cols<C>(part.depth);
    most_chains += most_chain_flags(part.cols) + most_chain_flags(part.depth);
    if (part.wants_dA) most_floats += most_partial_floats(part.cols, pass.most_rank());
    if (part.wants_dB) most_floats += most_partial_floats(part.depth, pass.most_rank()) + most_partial_cols(part.depth);
  }
  std::printf("%d %d %d %d %lld %lld %lld %lld %lld", s.row_pairs, s.groups, s.slices, s.rides, static_cast<long long>(ready_flags(pass.M)),
              chains, most_chains, floats, most_floats);
  std::printf(" %d %d %d %d %d %d %d", s.finish_spacing, C::kStages, C::kBlockN / kBox, C::kTileCols / kBox, boxes_of(C::kBlockR), C::kShrinkHalves, C::kGradientBlocks);
  for (int i = 0; i < pass.parts; ++i) std::printf(" %d %d %d", s.tile_cols[i], s.dA_pairs[i], s.dB_pairs[i]);
  std::printf(" ;");
  Cursor cursor(s);
  for (int index = 0;; ++index) {
    const Item item = cursor.item(s, index);
    if (item.work == Work::kEnd) break;
    std::printf(" %d %d %d %d %d", static_cast<int>(item.work), item.part, item.row_pair, item.col, item.stride);
  }
  std::printf("\n");
}

template <int kBlockN, Epilogue kEpilogue = Epilogue::kPlain>
void list_rank(const Pass& pass, int clusters) {
  switch (block_rank(pass.most_rank())) {
    case 16: return list<Config<kBlockN, 16, kEpilogue>>(pass, clusters);
    case 64: return list<Config<kBlockN, 64, kEpilogue>>(pass, clusters);
    case 128: return list<Config<kBlockN, 128, kEpilogue>>(pass, clusters);
    default: return list<Config<256, 256>>(pass, clusters);
  }
}

void list_gated(const Pass& pass, int clusters) {
  pass.backward ? list_rank<256, Epilogue::kGateGrad>(pass, clusters) : list_rank<256, Epilogue::kGate>(pass, clusters);
}

int main() {
  long long M;
  int backward, drops, out, gated, block_n, clusters, parts, summed;
  while (std::scanf("%lld %d %d %d %d %d %d %d %d", &M, &backward, &drops, &out, &gated, &block_n, &clusters, &parts, &summed) == 9) {
    Pass pass{M, backward != 0, drops != 0, out != 0, gated != 0, parts, summed, {}};
    for (int i = 0; i < parts; ++i) {
      long long cols, depth, r;
      int dA, dB;
      if (std::scanf("%lld %lld %lld %d %d", &cols, &depth, &r, &dA, &dB) != 5) return 1;
      pass.part[i] = {cols, depth, r, dA != 0, dB != 0};
    }
    if (gated) list_gated(pass, clusters);
    else block_n == 256 ? list_rank<256>(pass, clusters) : list_rank<128>(pass, clusters);
  }
}
