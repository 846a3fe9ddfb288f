"""Blocks of layers by each way to compute them: `python -m bench.blocks`.

Linears that read one x, gated MLPs, and single layers 5461 wide beside the same ones 5504 wide. Every way is checked
against the formula in float32 and then timed as `python -m bench` does it: kernel time on a GPU, the ways interleaved.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import timing
from .block_report import markdown
from .block_ways import CPU_BLOCKS, GPU_BLOCKS, WAYS, Block, Problem, build, reference, run
from .check import check_results
from .measure import checked_graph, dtype_on
from .record import RESULTS, environment, slug, write_files
from .shapes import FORWARD_BACKWARD, PASSES


def _kept_bytes(module: nn.Module, problem: Problem) -> int:
    """What a forward pass leaves allocated, its outputs among it."""
    run(module, problem, backward=False)
    gc.collect()
    before = torch.cuda.memory_allocated()
    ys = run(module, problem, backward=False)
    kept = torch.cuda.memory_allocated() - before
    del ys
    return kept


def _time(
    modules: dict[str, nn.Module],
    problem: Problem,
    expected: dict[bool, dict[str, Tensor]],
    backward: bool,
    rounds: int,
) -> timing.Samples:
    """Seconds by way. Raises WrongResultError, naming the result, where one is not the formula's."""
    calls = {name: lambda module=module: run(module, problem, backward) for name, module in modules.items()}
    dtype = problem.x.dtype
    if not problem.x.is_cuda:
        for name, call in calls.items():
            check_results(call(), expected[WAYS[name].adapters], dtype)
        return timing.time_eager(calls, rounds, "cpu")
    graphs = {name: checked_graph(call, expected[WAYS[name].adapters], dtype) for name, call in calls.items()}
    return timing.time_graphs(graphs, rounds)


def measure(block: Block, rounds: int, device: torch.device) -> dict[str, dict]:
    """By way: "seconds" of each pass, and on a GPU "kept_bytes" of the forward pass. Raises as _time does."""
    torch.compiler.reset()
    dtype = dtype_on(device)
    problem = Problem.make(block, device, dtype)
    expected = {adapters: reference(block, adapters, problem) for adapters in (False, True)}
    modules = {name: build(block, name, device, dtype) for name in block.ways()}
    for name, module in modules.items():
        if WAYS[name].compiled:
            module.compile(dynamic=False)
    found = {name: {"seconds": {}} for name in modules}
    for pass_name in PASSES:
        samples = _time(modules, problem, expected, pass_name == FORWARD_BACKWARD, rounds)
        for name, seconds in samples.items():
            found[name]["seconds"][pass_name] = seconds
    if device.type == "cuda":
        for name, module in modules.items():
            found[name]["kept_bytes"] = _kept_bytes(module, problem)
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS)
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for block in tqdm(GPU_BLOCKS if device.type == "cuda" else CPU_BLOCKS, desc="blocks"):
        results[block] = measure(block, options.rounds, device)
        gc.collect()
    about = environment(device, dtype_on(device), options.rounds)
    record = about | {"blocks": {str(block): found for block, found in results.items()}}
    text = markdown(results, about)
    print(text)
    texts = {"blocks.md": text, "blocks.json": json.dumps(record, indent=1) + "\n"}
    write_files(options.out or RESULTS / slug(device), texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
