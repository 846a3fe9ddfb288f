"""Tables of whole training steps, and what is written of them."""

import json
from pathlib import Path

from .record import described, write_files
from .step_arms import ARMS, FULL, Case, flops
from .step_plot import draw


def method(about: dict) -> str:
    """How it was measured, and on what."""
    ranks = f", on {about['ranks']} ranks, {about['accumulate']} micro-batches a step" if about["ranks"] > 1 else ""
    return (
        f"{described(about)} Random tokens{ranks}; a model's arms of one mode take their steps in turn, median of "
        f"{about['rounds']} rounds.\n"
    )


def table(case: Case, results: dict[str, dict]) -> str:
    """Markdown, a row for each arm; ratios are to full-rank training in the same mode."""
    lines = [
        f"### {case}",
        "",
        "| | mode | tokens/s | examples/s | over full-rank | ceiling | with its warm start | TFLOP/s | peak GiB |",
        "|---" * 9 + "|",
    ]
    for mode, arms in results.items():
        full = arms.get(FULL)
        for name in ARMS:
            if name not in arms:
                continue
            arm = arms[name]
            speedup = arm["tokens_per_second"] / full["tokens_per_second"] if full else float("nan")
            ceiling = flops(case, FULL) / flops(case, name)
            whole = 1 / (case.warm_start + (1 - case.warm_start) / speedup)
            peak = arm["peak_bytes"]
            best = f" ({arm['best'][1]:,.0f} at {arm['best'][0]})" if "best" in arm else ""
            cells = (
                ARMS[name][0], mode, f"{arm['tokens_per_second']:,.0f}{best}", f"{arm['examples_per_second']:,.1f}",
                f"{speedup:.2f}", f"{ceiling:.2f}", f"{whole:.2f}", f"{arm['tflops']:.0f}",
                "-" if peak is None else f"{peak / 2**30:.1f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(folder: Path, text: str, results: dict, measured: list[tuple[Case, dict]]) -> list[Path]:
    """steps.md, steps.json and, where matplotlib is installed and there is full-rank training, steps.png; the paths."""
    texts = {"steps.md": text, "steps.json": json.dumps(results, indent=1) + "\n"}
    if not any(FULL in arms for _, by_mode in measured for arms in by_mode.values()):
        return write_files(folder, texts)
    about = f"{results['device']}, {results['dtype']}"
    return write_files(folder, texts, "steps.png", lambda path: draw(measured, about, path))
