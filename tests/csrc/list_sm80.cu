// Reads passes of one linear from standard input, a line each: "M K N r backward sms shared_bytes". Writes for each one line: work,
// row, rows, col and first rank of each item of csrc/sm80's list.
#include <cstdio>

#include "../../csrc/sm80/tiling.cuh"

using namespace fused_lora;

int main() {
  long long M, K, N, r;
  int backward, sms, shared_bytes;
  while (std::scanf("%lld %lld %lld %lld %d %d %d", &M, &K, &N, &r, &backward, &sms, &shared_bytes) == 7) {
    const work::PassPart forward_part{N, K, r, false, false}, backward_part{K, N, r, true, true};
    const work::Pass pass{M, backward != 0, false, true, false, 1, 1, {backward ? backward_part : forward_part}};
    const work::Plan plan = work::make_plan(pass, sm80::tiling_of(pass, {80, sms, shared_bytes}));
    for (const work::Item& item : plan.items) {
      std::printf("%d %d %d %d %d ", static_cast<int>(item.work), item.row, item.rows, item.col, item.rank);
    }
    std::printf("\n");
  }
}
