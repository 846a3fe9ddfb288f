"""Blocks of layers by each way to compute them: `python -m bench.blocks`.

Linears that read one x, gated MLPs, and single layers 5461 wide beside the same ones 5504 wide. Every way is checked
against fused_lora.reference and then timed as `python -m bench` does it: kernel time on a GPU, the ways interleaved.
With --as sm80 a Hopper card plays an older one (played_blocks.py).
"""

import argparse
import functools
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fused_lora.extras import needs

from . import played, played_blocks, timing
from .block_report import entry, markdown, write
from .block_ways import CPU_BLOCKS, GPU_BLOCKS, WAYS, Block, Inputs, build, expected_results, run_block
from .check import check_results
from .document import write_samples
from .measure import checked_graph, dtype_on, outcome_of
from .record import RESULTS, environment, slug, summary
from .shapes import FORWARD_BACKWARD, PASSES
from .variants import PACKAGE

with needs("bench"):
    from tqdm import tqdm


@dataclass
class Measurement:
    """One block: what its ways work on and should find, and by way "seconds" of each pass or the "reason" for none."""

    block: Block
    inputs: Inputs
    expected: dict[bool, dict[str, Tensor]]  # by whether there are adapters
    found: dict[str, dict]

    @classmethod
    def make(cls, block: Block, device: torch.device) -> "Measurement":
        inputs = Inputs.make(block, device, dtype_on(device))
        expected = {adapters: expected_results(block, adapters, inputs) for adapters in (False, True)}
        return cls(block, inputs, expected, {name: {} for name in block.ways()})

    def attempt(self, name: str, do: Callable[[], object]):
        """do(), or None where it fails: a way that has failed once is left alone."""
        if "reason" in self.found[name]:
            return None
        try:
            return do()
        except Exception as error:
            self.found[name] = {"reason": outcome_of(error).reason}
            return None

    def prepare(self, name: str) -> nn.Module:
        layers = build(self.block, name, self.inputs.x.device, self.inputs.x.dtype)
        if WAYS[name].compiled:
            layers.compile(dynamic=False, fullgraph=True)
        return layers

    def checked(self, name: str, layers: nn.Module, backward: bool):
        """What is timed: a graph with its results, or on a CPU a call. Raises WrongResultError, naming the result."""

        def call():
            return run_block(layers, self.inputs, backward)

        expected, dtype = self.expected[WAYS[name].adapters], self.inputs.x.dtype
        if self.inputs.x.is_cuda:
            return checked_graph(call, expected, dtype)
        check_results(call(), expected, dtype)
        return call

    def time(self, layers: dict[str, nn.Module], backward: bool, rounds: int) -> timing.Samples:
        tried = {
            name: self.attempt(name, lambda name=name: self.checked(name, layers[name], backward)) for name in layers
        }
        ready = {name: what for name, what in tried.items() if what is not None}
        return timing.time_graphs(ready, rounds) if self.inputs.x.is_cuda else timing.time_eager(ready, rounds, "cpu")


def measure(block: Block, rounds: int, device: torch.device) -> dict[str, dict]:
    """By way: "seconds" of each pass, on a GPU "kept_bytes" of the forward pass; or a "reason" why not."""
    torch.compiler.reset()
    measurement = Measurement.make(block, device)
    found = measurement.found
    tried = {name: measurement.attempt(name, lambda name=name: measurement.prepare(name)) for name in found}
    layers = {name: each for name, each in tried.items() if each is not None}
    for pass_name in PASSES:
        for name, seconds in measurement.time(layers, pass_name == FORWARD_BACKWARD, rounds).items():
            found[name].setdefault("seconds", {})[pass_name] = summary(seconds)
    for name in layers if device.type == "cuda" else ():
        if "seconds" in found[name]:
            forward = functools.partial(run_block, layers[name], measurement.inputs, backward=False)
            found[name]["kept_bytes"] = timing.kept_memory(forward)
    return found


def main(arguments: list[str] | None = None) -> int:
    """0, or 1 where this package has no time."""
    parser = argparse.ArgumentParser(prog="python -m bench.blocks", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS)
    parser.add_argument("--as", dest="card", choices=played.SHARED_BYTES, help="on a Hopper card: as such a card")
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="a file, not for git, for every sample too")
    options = parser.parse_args(arguments)
    if options.card:
        if played.obstacle():
            parser.error(f"--as {options.card} needs a GPU of compute capability 9.0: {played.obstacle()}")
        played.play(options.card)
        WAYS.update(played_blocks.ways(options.card))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = environment(device, dtype_on(device), options.rounds) | {"blocks": []}
    for block in tqdm(GPU_BLOCKS if device.type == "cuda" else CPU_BLOCKS, desc="blocks"):
        results["blocks"].append(entry(block, measure(block, options.rounds, device)))
        write(results, options.out or RESULTS / slug(device))  # so that what is stopped keeps what it has measured
        write_samples(results, options.samples)
        gc.collect()
    print(markdown(results))
    return 0 if all("seconds" in each["ways"][PACKAGE] for each in results["blocks"]) else 1


if __name__ == "__main__":
    sys.exit(main())
