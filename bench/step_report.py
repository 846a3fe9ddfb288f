"""From whole training steps to files: steps.json, steps.md and steps.png in one folder."""

from dataclasses import asdict
from pathlib import Path

from .document import as_json, common, described, table, write_files
from .step_arms import ARMS
from .step_cases import CASES, CPU_CASES, FULL, Case, flops
from .step_plot import draw

HEADER = [
    "", "mode", "tokens/s", "spread", "examples/s", "over full-rank", "ceiling", "with its warm start", "TFLOP/s",
    "peak GiB",
]  # fmt: skip


def entry(case: Case, modes: dict[str, dict]) -> dict:
    """What results hold of a case."""
    return {"case": asdict(case), "modes": modes}


def measured(results: dict) -> list[tuple[Case, dict[str, dict]]]:
    """(case, results by mode and arm)."""
    return [(Case(**each["case"]), each["modes"]) for each in results["cases"]]


def merged(runs: list[dict]) -> dict:
    """Runs of different cases or modes on one device, at one commit, as one; in the order of CASES."""
    about = common(runs)
    by_case: dict[Case, dict] = {}
    for run in runs:
        for case, modes in measured(run):
            by_case[case] = by_case.get(case, {}) | modes
    presets = [case.preset for case in CASES + CPU_CASES]
    cases = sorted(by_case, key=lambda case: presets.index(case.preset))
    return about | {"cases": [entry(case, by_case[case]) for case in cases]}


def _method(about: dict) -> str:
    ranks = f"on {about['ranks']} ranks, " if about["ranks"] > 1 else ""
    batches = f"{about['accumulate']} micro-batches a step, " if about["accumulate"] > 1 else ""
    return (
        f"{described(about)} Random tokens, {ranks}{batches}a model's arms of one mode taking their steps in turn: the "
        f"median, and from the first to the third quartile as its spread. By `{about['command']}`.\n"
    )


def _row(case: Case, mode: str, name: str, arms: dict[str, dict]) -> list[str]:
    arm, full = arms[name], arms.get(FULL)
    speedup = arm["tokens_per_second"] / full["tokens_per_second"] if full else float("nan")
    best = f" ({arm['best'][1]:,.0f} at {arm['best'][0]})" if "best" in arm else ""
    return [
        ARMS[name][0], mode, f"{arm['tokens_per_second']:,.0f}{best}", f"{(arm['q3'] - arm['q1']) / arm['median']:.1%}",
        f"{arm['examples_per_second']:,.1f}", f"{speedup:.2f}", f"{flops(case, FULL) / flops(case, name):.2f}",
        f"{1 / (case.warm_start + (1 - case.warm_start) / speedup):.2f}", f"{arm['tflops']:.0f}",
        "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.1f}",
    ]  # fmt: skip


def step_table(case: Case, modes: dict[str, dict]) -> list[str]:
    """Lines of Markdown, a row for each arm; ratios are to full-rank training in the same mode."""
    rows = [_row(case, mode, name, arms) for mode, arms in modes.items() for name in ARMS if name in arms]
    return table(HEADER, rows)


def markdown(results: dict) -> str:
    """All tables."""
    lines = [_method(results)]
    for case, modes in measured(results):
        counts = sorted({arm["count"] for arms in modes.values() for arm in arms.values()})
        rounds = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
        lines += [f"### {case}: {rounds} rounds", "", *step_table(case, modes), ""]
    return "\n".join(lines)


def write(results: dict, folder: Path) -> list[Path]:
    """steps.md, steps.json and, where matplotlib is installed and there is full-rank training, steps.png; the paths."""
    texts = {"steps.md": markdown(results), "steps.json": as_json(results)}
    with_full = any(FULL in arms for _, modes in measured(results) for arms in modes.values())
    return write_files(
        folder, texts, {"steps.png": lambda path: draw(measured(results), results, path)} if with_full else {}
    )
