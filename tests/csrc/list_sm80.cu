// Reads passes of linears of one size from standard input, a line each: "M K N r backward capability sms shared_bytes halves drops
// parts". Writes for each one line: the items of csrc/sm80's list; with halves as kernels get it, without them before any was cut.
#include <cstdio>

#include "../../csrc/sm80/tiling.cuh"
#include "../../csrc/work/halves.h"
#include "print_items.h"

using namespace fused_lora;

int main() {
  long long M, K, N, r;
  int backward, capability, sms, shared_bytes, halves, drops, parts;
  while (std::scanf("%lld %lld %lld %lld %d %d %d %d %d %d %d", &M, &K, &N, &r, &backward, &capability, &sms, &shared_bytes, &halves, &drops, &parts) == 11) {
    const work::PassPart forward_part{N, K, r, false, false, false}, backward_part{K, N, r, true, true, false};
    work::Pass pass{M, backward != 0, drops != 0, true, false, parts, parts, {}};
    for (int i = 0; i < parts; ++i) pass.part[i] = backward ? backward_part : forward_part;
    work::Plan plan = work::make_plan(pass, sm80::tiling_of(pass, {capability, sms, shared_bytes}));
    if (halves) plan = work::balanced(pass, plan);
    print_items(plan.items);
  }
}
