"""`make sanitize`: small passes, forward and backward, for compute-sanitizer to watch. Arguments: which of them, or
--aligned, for initcheck: all but MLPs of ranks that are no multiples of 8, and rows that choose their adapters. The
tool does not see what the copy engine stores: of such ranks torch copies xa, which counts as read before it was
written.
"""

import sys
import time

import torch

from fused_lora import backends, choices, lora_linear
from fused_lora.ops import lora_segments
from tests.ops import test_lora_group, test_lora_mlp, test_lora_segments_mlp
from tests.ops.problem import SCALE, make_dy, make_inputs, run, seed_on
from tests.ops.segments_problem import Problem
from tests.ops.test_gains import with_gains
from tests.segments.divisions import Division

# M, K, N, r, p: narrow tiles, then wide ones (which many rows get, and r > 128) with chained sums; with dropout and
# without; r <= 16 into few columns rides; edges in every dimension;
# rows that start anywhere.
PASSES = [
    (300, 264, 392, 5, 0.0), (600, 520, 264, 64, 0.25), (513, 264, 1032, 100, 0.25), (130, 1032, 264, 256, 0.0),
    (9000, 136, 136, 16, 0.0), (9000, 136, 136, 16, 0.25), (9000, 136, 136, 64, 0.25), (9000, 136, 136, 128, 0.25),
    (600, 264, 264, 200, 0.25), (300, 265, 391, 40, 0.25), (600, 267, 129, 16, 0.0),
]  # fmt: skip


# Groups, and MLPs of three ranks.
KINDS = ("q, k, v", "q, k, v with gains", (16, 8, 5), (64, 33, 16), (128, 128, 128))
BLOCKS = [(kind, p) for p in (0.0, 0.25) for kind in KINDS]


# Rows that choose their adapters; MLPs, dropout and up to 64 rows without gradients have kernels of their own.
DIVISIONS = {
    "a row each": Division((16,) * 4, tuple((i, 1) for i in range(4))),
    "mixed": Division((16, 100, 8, 64), ((1, 300), (None, 40), (0, 3), (3, 2200), (2, 57)), behind=9),
    "sums": Division((16, 64, 16), (((0, 1), 200), ((2,), 100), ((1, 2), 150))),
}
SEGMENTS = [(name, kind) for name in DIVISIONS for kind in ("alone", "without gradients", "dropout", "an MLP")]


def run_linear(M: int, K: int, N: int, r: int, p: float) -> None:
    inputs = make_inputs(M, K, N, r, "cuda", torch.bfloat16)
    assert backends.choose_lora_linear(inputs["x"].device, torch.bfloat16, r).name == "cuda"
    scale = torch.tensor(SCALE).cuda()
    run(lora_linear, inputs, make_dy(inputs), scale=scale, p=p, seed=seed_on("cuda") if p else None)


def run_block(kind: str | tuple[int, int, int], p: float) -> None:
    options = {"p": p, "seed": seed_on("cuda")} if p else {}
    if isinstance(kind, tuple):
        x, parts = test_lora_mlp.make_mlp(600, 264, 391, 264, kind, "cuda", torch.bfloat16)
        test_lora_mlp.results(test_lora_mlp.fused, x, parts, torch.ones_like(x), "silu", **options)
        return
    x, parts = test_lora_group.make_group(600, 264, [(392, 24), (137, 8), (40, 0)], "cuda", torch.bfloat16)
    parts = with_gains(parts) if kind.endswith("gains") else parts
    dys = [part["weight"].new_ones(600, part["weight"].shape[0]) for part in parts]
    test_lora_group.results(test_lora_group.grouped, x, parts, dys, **options)


def run_segments(name: str, kind: str) -> None:
    division = DIVISIONS[name]
    if kind == "an MLP":
        test_lora_segments_mlp.OnHopper(division, 264, 392, 136, torch.bfloat16, "silu").run()
        return
    problem = Problem(division, 264, (392, 136), drops=kind == "dropout")
    if kind != "without gradients":
        problem.run()
        return
    with torch.no_grad():
        lora_segments(problem.x, [linear.routed() for linear in problem.linears])


def is_aligned(each: tuple) -> bool:
    if each in SEGMENTS:
        return False
    return not isinstance(each[0], tuple) or all(r % 8 == 0 for r in each[0])


def has_kernels(name: str, kind: str) -> bool:
    """csrc/sm90 alone has these."""
    device = torch.device("cuda", torch.cuda.current_device())
    if kind == "dropout":
        return choices.choose_segments(device, torch.bfloat16, 64, True, True).name == "cuda"
    return kind != "an MLP" or choices.gated_segments_obstacle(device, 64, False) is None


def main(arguments: list[str]) -> None:
    """The tools slow these down a hundredfold and more: the seconds say that something goes on."""
    passes = [(run_linear, each) for each in PASSES] + [(run_block, each) for each in BLOCKS]
    passes += [(run_segments, each) for each in SEGMENTS if has_kernels(*each)]
    if arguments == ["--aligned"]:
        arguments = [number for number, (_, each) in enumerate(passes) if is_aligned(each)]
    start = time.monotonic()
    for number in map(int, arguments or range(len(passes))):
        run_pass, each = passes[number]
        print(f"{time.monotonic() - start:6.1f} s: pass {number}, {each}", flush=True)
        run_pass(*each)
        torch.cuda.synchronize()
    # Autograd's thread may still want Python's lock, to let go of tensors: Python's end would abort it and the process.
    time.sleep(1)
    print(f"{time.monotonic() - start:6.1f} s: done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
