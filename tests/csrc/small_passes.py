"""`make sanitize`: small passes, forward and backward, for compute-sanitizer to watch."""

import torch

from fused_lora import backends, lora_linear
from tests.ops import test_lora_group, test_lora_mlp
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
    for p in (0.0, 0.25):
        options = {"p": p, "seed": seed} if p else {}
        x, parts = test_lora_group.make_group(600, 264, [(392, 24), (137, 8), (40, 0)], "cuda", torch.bfloat16)
        dys = [part["weight"].new_ones(600, part["weight"].shape[0]) for part in parts]
        test_lora_group.results(test_lora_group.grouped, x, parts, dys, **options)
        for ranks in ((16, 8, 5), (64, 33, 16), (128, 128, 128)):
            x, parts = test_lora_mlp.make_mlp(600, 264, 391, 264, ranks, "cuda", torch.bfloat16)
            test_lora_mlp.results(test_lora_mlp.fused, x, parts, torch.ones_like(x), "silu", **options)
        torch.cuda.synchronize()
        print("groups and MLPs", p, flush=True)


if __name__ == "__main__":
    main()
