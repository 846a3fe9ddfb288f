"""Rows with adapters of their own through one linear, by each way to compute them: `python -m bench.adapters`.

Forward and backward with the gradients of x and of all factors, and inference, as captured graphs and as whole calls,
which is all that PEFT has: it asks the host for indices in each. All ways are checked against fused_lora.reference
before one is timed, and their rounds are interleaved. --few has few rows, as generation does. --step has training steps
of several adapters of a whole model (adapter_step.py), --cache what an AdapterCache costs (adapter_cache.py).
"""

import argparse
import gc
import shlex
import sys
from pathlib import Path

import torch

from fused_lora.extras import needs

from . import adapter_cache, adapter_step, timing
from .adapter_arms import ARMS, GATHERED, Arm, Inputs
from .adapter_cases import FEW_CASES, GPU_CASES, TINY_CASES, TINY_FEW_CASES, Case
from .adapter_report import CALLS, markdown, write
from .check import WrongResultError, check_results
from .document import redraw
from .measure import checked_graph, dtype_on, outcome_of
from .record import RESULTS, environment, slug, summary
from .shapes import FORWARD, FORWARD_BACKWARD

with needs("bench"):
    from tqdm import tqdm

Expected = dict[str, dict[str, torch.Tensor]]  # by work


def prepare(inputs: Inputs, names: list[str], backward: bool) -> tuple[dict[str, Arm], dict[str, str], Expected]:
    """Those that can run, why the others cannot, and what they should find. Raises WrongResultError where one finds
    something else, backward too where that is asked for and it trains."""
    arms, reasons, expected = {}, {}, {}
    for name in names:
        try:
            arm = ARMS[name][1](inputs)
            if arm.work not in expected:
                expected[arm.work] = inputs.expected(arm.work)
            check_results(arm.run(inputs.problem, backward and arm.trains), expected[arm.work], inputs.problem.x.dtype)
            arms[name] = arm
        except WrongResultError as error:
            raise WrongResultError(f"{ARMS[name][0]}: {error}") from None
        except Exception as error:
            reasons[name] = outcome_of(error).reason
    return arms, reasons, expected


def passes_of(device: torch.device, few: bool) -> list[str]:
    """A CPU has whole calls alone."""
    training = [] if few else [FORWARD_BACKWARD]
    return [*training, FORWARD, CALLS] if device.type == "cuda" else [*training, CALLS]


def time_pass(
    pass_name: str, arms: dict[str, Arm], inputs: Inputs, expected: Expected, rounds: int
) -> tuple[timing.Samples, dict[str, str]]:
    """Of the arms that have the pass, and why others cannot be captured."""
    problem, backward = inputs.problem, pass_name == FORWARD_BACKWARD
    calls = {
        name: lambda arm=arm: arm.run(problem, backward)
        for name, arm in arms.items()
        if arm.trains or pass_name == CALLS
    }
    if not problem.x.is_cuda or pass_name == CALLS:
        return timing.time_eager(calls, rounds, problem.x.device.type), {}
    graphs, reasons = {}, {}
    for name, call in calls.items():
        try:
            graphs[name] = checked_graph(call, expected[arms[name].work], problem.x.dtype)
        except WrongResultError as error:
            raise WrongResultError(f"{ARMS[name][0]}, captured: {error}") from None
        except Exception as error:
            reasons[name] = f"{pass_name} as a graph: {outcome_of(error).reason}"
    return timing.time_graphs(graphs, rounds), reasons


def measure(case: Case, names: list[str], passes: list[str], rounds: int, device: torch.device) -> dict[str, dict]:
    """By arm: "seconds" of each pass that it has, and a "reason" where one that it should have is missing."""
    inputs = Inputs.make(case, device, dtype_on(device))
    arms, reasons, expected = prepare(inputs, names, FORWARD_BACKWARD in passes)
    found: dict[str, dict] = {name: {"seconds": {}} for name in names}
    for pass_name in passes:
        samples, more = time_pass(pass_name, arms, inputs, expected, rounds)
        reasons |= more
        for name, seconds in samples.items():
            found[name]["seconds"][pass_name] = summary(seconds)
    return {name: arm | ({"reason": reasons[name]} if name in reasons else {}) for name, arm in found.items()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.adapters", description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--few", action="store_true", help="inference of few rows instead")
    which.add_argument("--step", action="store_true", help="training steps of a model's adapters instead")
    which.add_argument("--cache", action="store_true", help="adapters that come from the host's memory instead")
    parser.add_argument("--tiny", action="store_true", help="small cases, which are all that a CPU has")
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS))
    parser.add_argument("--cases", type=int, nargs="+", metavar="NUMBER", help="these cases, counted from 0")
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS)
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    parser.add_argument("--redraw", type=Path, nargs="+", metavar="JSON", help="measure nothing: files of a JSON file")
    return parser.parse_args(arguments)


def _measure_all(options: argparse.Namespace, device: torch.device, results: dict, folder: Path) -> None:
    """Fills results["cases"] and writes after each, so that what is stopped keeps what it has."""
    of_gpu, of_cpu = (FEW_CASES, TINY_FEW_CASES) if options.few else (GPU_CASES, TINY_CASES)
    cases = of_cpu if options.tiny or device.type != "cuda" else of_gpu
    names = [name for name in options.arms if options.few or name != GATHERED]
    passes = passes_of(device, options.few)
    for number in tqdm(options.cases or range(len(cases)), desc="adapters"):
        case = cases[number]
        found = measure(case, names, passes, options.rounds, device)
        results["cases"].append({"name": str(case), "short": case.name, "arms": found})
        write(results, folder)
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """0, or an exception where an arm is wrong."""
    options = parse(arguments)
    if options.redraw:
        redraw(options.redraw, options.out, lambda runs: runs[0], write)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = sys.argv[1:] if arguments is None else arguments
    about = environment(device, dtype_on(device), options.rounds)
    results = about | {"command": shlex.join(["python", "-m", "bench.adapters", *words]), "cases": []}
    results["kind"] = next((kind for kind in ("few", "step", "cache") if getattr(options, kind)), "linear")
    folder = options.out or RESULTS / slug(device)
    tiny = options.tiny or device.type != "cuda"
    if options.step:
        results["step"] = adapter_step.measure(adapter_step.TINY if tiny else adapter_step.STEP, options.rounds, device)
        write(results, folder)
    elif options.cache:
        of = adapter_cache.TINY if tiny else adapter_cache.CACHED
        results["cache"] = adapter_cache.measure(of, options.rounds, device)
        write(results, folder)
    else:
        _measure_all(options, device, results, folder)
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
