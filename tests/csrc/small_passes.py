"""`make sanitize`: six small passes, forward and backward, for compute-sanitizer to watch."""

import torch

from fused_lora import backends, lora_linear
from tests.ops.problem import SCALE, make_dy, make_inputs, run, seed_on

# Several groups of rows, chained sums, riding, dropout, every rank's kernel, edges in every dimension: M, K, N, r, p.
PASSES = [
    (300, 264, 392, 5, 0.0), (2500, 136, 320, 16, 0.0), (4200, 72, 136, 9, 0.0), (600, 520, 264, 64, 0.25),
    (513, 264, 1032, 100, 0.25), (130, 1032, 264, 256, 0.0),
]  # fmt: skip


def main() -> None:
    scale = torch.tensor(SCALE).cuda()
    seed = seed_on("cuda")
    for M, K, N, r, p in PASSES:
        inputs = make_inputs(M, K, N, r, "cuda", torch.bfloat16)
        assert backends.choose_lora_linear(inputs["x"].device, torch.bfloat16, K, N, r).name == "cuda"
        run(lora_linear, inputs, make_dy(inputs), scale=scale, p=p, seed=seed if p else None)
        torch.cuda.synchronize()
        print((M, K, N, r, p), flush=True)


if __name__ == "__main__":
    main()
