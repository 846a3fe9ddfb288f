"""Training steps of Hugging Face models with LoRA, by PEFT and by this package: `python -m bench.models`.

Forward, loss, backward and AdamW's step in bfloat16, r = 16 on all linears of the blocks, on random tokens and random
weights of each model's shapes. All arms of a case stand on the same frozen weights and take their steps in turn, so
that only the ratios of one run are compared. The losses of their first and last steps must agree.
"""

import argparse
import gc
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

from fused_lora.extras import needs

with needs("test"):
    import peft  # noqa: F401
    import transformers  # noqa: F401
    from tqdm import tqdm

from .document import redraw
from .model_arms import ARMS, ModelArm, base_of, make
from .model_cases import CASES, CPU_CASES, SETTINGS, Case, Setting
from .model_report import markdown, merged, write
from .record import RESULTS, circumstances, slug, summary
from .step_timing import peak_bytes, time_steps
from .variants import FLOOR

ROUNDS = 10
# Of losses, relative, between two ways to compute them in 16 bits; where dropout picks other entries it is no error.
TOLERANCE = 0.01


def check(arms: dict[str, ModelArm], setting: Setting) -> None:
    """Raises AssertionError where two arms that should compute the same do not."""
    with_factors = [name for name in arms if name != FLOOR]
    for name in with_factors[1:]:
        for step in (0, -1):
            value, expected = arms[name].losses[step].item(), arms[with_factors[0]].losses[step].item()
            if abs(value / expected - 1) > TOLERANCE * (10 if setting.dropout else 1):
                raise AssertionError(f"{name}'s loss is {value}, {with_factors[0]}'s {expected}, in step {step}")


def measure(case: Case, setting: Setting, names: list[str], rounds: int, device: torch.device) -> dict[str, dict]:
    """Results of a case in one setting, by arm: a summary of its samples, tokens a second, bytes and losses."""
    torch._dynamo.reset()
    base = base_of(case, device)
    arms = {name: make(base, case, setting, name) for name in names}
    samples = time_steps(arms, rounds, device)
    check(arms, setting)
    found = {}
    for name, times in samples.items():
        seconds, losses = summary(times), arms[name].losses
        found[name] = seconds | {
            "tokens_per_second": case.tokens / seconds["median"],
            "losses": [losses[0].item(), losses[-1].item()],
            "peak_bytes": peak_bytes(arms[name]) if device.type == "cuda" else None,
        }
    return found


def _case(text: str) -> Case:
    for case in CASES + CPU_CASES:
        if case.name == text:
            return case
    raise argparse.ArgumentTypeError(f"must be one of {', '.join(case.name for case in CASES + CPU_CASES)}, got {text}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=_case, nargs="+", help="models (all that are for this device)")
    parser.add_argument("--settings", choices=list(SETTINGS), nargs="+", default=list(SETTINGS))
    parser.add_argument("--arms", choices=list(ARMS), nargs="+", default=list(ARMS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch", type=int, help="sequences of a step, instead of each case's own")
    parser.add_argument("--out", type=Path, help="the folder to write (bench/results/<device>)")
    parser.add_argument(
        "--redraw", type=Path, nargs="+", metavar="JSON", help="measure nothing: table and picture of models.json files"
    )
    return parser.parse_args(arguments)


def _measure_all(options: argparse.Namespace, device: torch.device, results: dict, folder: Path) -> None:
    """Fills results["cases"] and writes after each setting, so that what is stopped keeps what it has."""
    cases = options.cases or (CASES if device.type == "cuda" else CPU_CASES)
    with tqdm(total=len(cases) * len(options.settings), desc="models") as bar:
        for case in cases:
            case = replace(case, batch=options.batch) if options.batch else case
            by_setting: dict[str, dict] = {}
            results["cases"].append({"name": str(case), "short": case.name, "settings": by_setting})
            for name in options.settings:
                bar.set_postfix_str(f"{case.name}, {name}")
                by_setting[name] = measure(case, SETTINGS[name], options.arms, options.rounds, device)
                write(results, folder)
                gc.collect()  # compiled models are in cycles
                torch.cuda.empty_cache()
                bar.update()


def main(arguments: list[str] | None = None) -> int:
    """0, or an exception where an arm is wrong."""
    options = parse(arguments)
    if options.redraw:
        redraw(options.redraw, options.out, merged, write)
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = sys.argv[1:] if arguments is None else arguments
    about = circumstances(device, torch.bfloat16) | {"command": shlex.join(["python", "-m", "bench.models", *words])}
    results = about | {"settings": {name: asdict(each) for name, each in SETTINGS.items()}, "cases": []}
    _measure_all(options, device, results, options.out or RESULTS / slug(device))
    print(markdown(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
