"""`make sanitize`: small passes, forward and backward, for compute-sanitizer to watch."""

import torch

from fused_lora import backends, lora_linear
from tests.ops.problem import SCALE, make_dy, make_inputs, run, seed_on

# M, K, N, r, p: narrow tiles, then wide ones (which many rows get, and r > 128) with chained sums; with dropout and
# without; r <= 16 into few columns rides; edges in every dimension;
# rows that start anywhere.
PASSES = [
    (300, 264, 392, 5, 0.0), (600, 520, 264, 64, 0.25), (513, 264, 1032, 100, 0.25), (130, 1032, 264, 256, 0.0),
    (9000, 136, 136, 16, 0.0), (9000, 136, 136, 16, 0.25), (9000, 136, 136, 64, 0.25), (9000, 136, 136, 128, 0.25),
    (600, 264, 264, 200, 0.25), (300, 265, 391, 40, 0.25), (600, 267, 129, 16, 0.0),
]  # fmt: skip


def main() -> None:
    scale = torch.tensor(SCALE).cuda()
    seed = seed_on("cuda")
    for M, K, N, r, p in PASSES:
        inputs = make_inputs(M, K, N, r, "cuda", torch.bfloat16)
        assert backends.choose_lora_linear(inputs["x"].device, torch.bfloat16, r).name == "cuda"
        run(lora_linear, inputs, make_dy(inputs), scale=scale, p=p, seed=seed if p else None)
        torch.cuda.synchronize()
        print((M, K, N, r, p), flush=True)


if __name__ == "__main__":
    main()
