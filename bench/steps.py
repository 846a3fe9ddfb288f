"""Whole training steps of a LLaMA, by each way to train its linears: `python -m bench.steps`.

Forward, loss, backward and AdamW's step in bfloat16, on random tokens. Every arm trains embeddings, norms and head as
ReLoRA does; they differ in the linears of the blocks. All arms of a case stand in memory together and take their steps
in turn, so that only the ratios of one run are compared. Compiled arms compile the block, once for all blocks, and the
loss.

Under torchrun, each rank takes a step's micro-batches as DistributedDataParallel does it, with no_sync until the last.
"""

import argparse
import gc
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fused_lora.extras import needs
from fused_lora.pretrain.ranks import Ranks, joined

from .document import redraw, write_samples
from .record import RESULTS, circumstances, slug, summary
from .step_arms import ARMS, Arm
from .step_cases import CASES, CPU_CASES, FULL, Case, flops
from .step_report import entry, markdown, merged, write
from .step_timing import peak_bytes, time_steps
from .variants import FLOOR

with needs("bench"):
    from tqdm import tqdm

EAGER, COMPILED = "eager", "compiled"
# Of one step's results, relative, between two ways to compute them in 16 bits.
TOLERANCE = 0.03
# Of a case; and of each micro-batch that is tried.
ROUNDS, BEST_ROUNDS = 8, 5
# Table 4 counts examples of this many tokens.
EXAMPLE = 512


def check(arms: dict[str, Arm]) -> None:
    """Raises AssertionError where two arms that should compute the same do not."""
    with_factors = sorted((name for name in arms if name not in (FLOOR, FULL)), key=lambda name: name != "unfused")
    results = {name: arms[name].results() for name in with_factors}
    for name in with_factors[1:]:
        for what, expected in results[with_factors[0]].items():
            value = results[name][what]
            assert abs(value / expected - 1) < TOLERANCE, f"{name}: {what} is {value}, {with_factors[0]} has {expected}"


def available(names: list[str]) -> list[str]:
    """Without those whose library is not here."""
    try:
        import peft  # noqa: F401
    except ImportError:
        return [name for name in names if name != "peft"]
    return names


def measure(case: Case, mode: str, names: list[str], rounds: int, device: torch.device, accumulate: int = 1) -> dict:
    """Results of a case in one mode, by arm: a summary of its samples, tokens/s, bytes."""
    torch._dynamo.reset()
    arms = {name: Arm.make(case, name, device, mode == COMPILED, accumulate) for name in available(names)}
    check(arms)
    samples = time_steps(arms, rounds, device)
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    found = {}
    for name, times in samples.items():
        seconds = summary(times)
        rate = ranks * accumulate * case.tokens / seconds["median"]
        found[name] = seconds | {
            "tokens_per_second": rate,
            "examples_per_second": rate / EXAMPLE,
            "tflops": flops(case, name) * rate / case.tokens * 1e-12,
            "peak_bytes": peak_bytes(arms[name]) if device.type == "cuda" else None,
        }
    return found


def _free(device: torch.device) -> None:
    """Compiled models are in cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def best_batch(case: Case, mode: str, name: str, device: torch.device) -> tuple[int, float]:
    """(sequences, tokens/s) of the micro-batch with which an arm is fastest, doubled while it fits and is not clearly
    slower."""
    rates: dict[int, float] = {}
    while True:
        try:
            rates[case.batch] = measure(case, mode, [name], BEST_ROUNDS, device)[name]["tokens_per_second"]
        except torch.OutOfMemoryError:
            break
        finally:
            _free(device)
        if rates[case.batch] < 0.95 * max(rates.values()):
            break
        case = replace(case, batch=2 * case.batch)
    return max(rates.items(), key=lambda pair: pair[1]) if rates else (0, 0.0)


def _case(text: str) -> Case:
    for case in CASES + CPU_CASES:
        if case.preset == text:
            return case
    raise argparse.ArgumentTypeError(
        f"must be one of {', '.join(case.preset for case in CASES + CPU_CASES)}, got {text}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=_case, nargs="+", help="models (all that are for this device)")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS))
    parser.add_argument("--modes", choices=(EAGER, COMPILED), nargs="+", default=[EAGER, COMPILED])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, help="sequences of a micro-batch, instead of each case's own")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    parser.add_argument("--best", action="store_true", help="each arm at its best micro-batch too")
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>, best/ in it if --best)")
    parser.add_argument("--samples", type=Path, metavar="FILE", help="a file, not for git, for every sample too")
    parser.add_argument(
        "--redraw", type=Path, nargs="+", metavar="JSON", help="measure nothing: tables and picture of steps.json files"
    )
    options = parser.parse_args(arguments)
    if options.best and (options.accumulate > 1 or _ranks() > 1):
        parser.error("--best is for one process and one micro-batch a step: ranks could disagree")
    return options


def _ranks() -> int:
    """As torchrun says, before they have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _command(arguments: list[str] | None) -> str:
    launcher = f"torchrun --nproc-per-node {_ranks()} -m" if _ranks() > 1 else "python -m"
    words = list(sys.argv[1:] if arguments is None else arguments)
    for option in ("--out", "--samples"):  # where results went is no part of how they were measured
        if option in words:
            place = words.index(option)
            del words[place : place + 2]
    return shlex.join([*launcher.split(), "bench.steps", *words])


def _folder(options: argparse.Namespace, ranks: Ranks) -> Path:
    name = slug(ranks.device) + (f"-x{ranks.world}" if ranks.world > 1 else "")
    return options.out or RESULTS / name / ("best" if options.best else "")


def _measure_all(options: argparse.Namespace, ranks: Ranks, results: dict) -> None:
    """Fills results["cases"]; the first rank writes after every case, so that what is stopped keeps what it has."""
    device = ranks.device
    cases = options.cases or (CASES if device.type == "cuda" else CPU_CASES)
    with tqdm(total=len(cases) * len(options.modes), desc="steps", disable=not ranks.first) as bar:
        for case in cases:
            case = replace(case, batch=options.batch) if options.batch else case
            modes = {}
            for mode in options.modes:
                bar.set_postfix_str(f"{case}, {mode}")
                modes[mode] = measure(case, mode, options.arms, options.rounds, device, options.accumulate)
                _free(device)
                if options.best:
                    for name, arm in modes[mode].items():
                        arm["best"] = best_batch(case, mode, name, device)
                bar.update()
            results["cases"].append(entry(case, modes))
            if ranks.first:
                write(results, _folder(options, ranks))
                write_samples(results, options.samples)


def main(arguments: list[str] | None = None) -> int:
    """0, or an exception where an arm is wrong."""
    options = parse(arguments)
    if options.redraw:
        redraw(options.redraw, options.out, merged, write)
        return 0
    with joined("cuda" if torch.cuda.is_available() else "cpu") as ranks:
        method = {"ranks": ranks.world, "accumulate": options.accumulate, "command": _command(arguments)}
        results = circumstances(ranks.device, torch.bfloat16) | method | {"cases": []}
        _measure_all(options, ranks, results)
        if ranks.first:
            print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
