// Reads passes from standard input, "M N K r backward drops wants_out wants_dA wants_dB block_n clusters" a line, and writes for each one line:
// of sizes, then of work items, four numbers each, in the order of the list.
#include <cstdio>

#include "../../csrc/sm90/plan.cuh"

using namespace fused_lora::sm90;

template <typename C>
void list(const Pass& pass, int clusters) {
  const Schedule s = make_schedule<C>(pass, clusters);
  const bool dA = pass.wants_dA, dB = pass.wants_dB;
  const long long flags = (dA ? chain_flags<C>(pass.N) : 0) + (dB ? chain_flags<C>(pass.K) : 0);
  const long long floats = (dA ? partial_floats<C>(pass.N) : 0) + (dB ? partial_floats<C>(pass.K) + partial_cols<C>(pass.K) : 0);
  std::printf("%d %d %d %d %d %d %lld %lld %lld %lld %lld ;", s.row_pairs, s.tile_cols, s.dA_pairs, s.dB_pairs, s.slice_pairs, s.rides,
              static_cast<long long>(ready_flags(pass.M)), flags,
              static_cast<long long>(most_chain_flags(pass.K) + most_chain_flags(pass.N)), floats,
              static_cast<long long>(most_partial_floats(pass.K, pass.r) + most_partial_floats(pass.N, pass.r) + most_partial_cols(pass.K)));
  Cursor cursor(s);
  for (int index = 0;; ++index) {
    const Item item = cursor.item(s, index);
    if (item.work == Work::kEnd) break;
    std::printf(" %d %d %d %d", static_cast<int>(item.work), item.row_pair, item.col, item.stride);
  }
  std::printf("\n");
}

template <int kBlockN>
void list_rank(const Pass& pass, int clusters) {
  switch (block_rank(pass.r)) {
    case 16: return list<Config<kBlockN, 16>>(pass, clusters);
    case 64: return list<Config<kBlockN, 64>>(pass, clusters);
    case 128: return list<Config<kBlockN, 128>>(pass, clusters);
    default: return list<Config<256, 256>>(pass, clusters);
  }
}

int main() {
  long long M, N, K, r;
  int backward, drops, out, dA, dB, block_n, clusters;
  while (std::scanf("%lld %lld %lld %lld %d %d %d %d %d %d %d", &M, &N, &K, &r, &backward, &drops, &out, &dA, &dB, &block_n, &clusters) == 11) {
    const Pass pass{M, N, K, r, backward != 0, drops != 0, out != 0, dA != 0, dB != 0};
    block_n == 256 ? list_rank<256>(pass, clusters) : list_rank<128>(pass, clusters);
  }
}
