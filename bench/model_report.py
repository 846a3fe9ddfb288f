"""From training steps of Hugging Face models to files: models.json, models.md and models.png in one folder."""

from pathlib import Path

from .document import as_json, common, described, table, write_files
from .model_arms import ARMS
from .model_plot import draw
from .variants import FLOOR

HEADER = ["", "setting", "tokens/s", "of the floor's", "spread", "peak GiB", "loss, first step", "last step"]


def merged(runs: list[dict]) -> dict:
    """Runs of different cases, settings or arms on one device, at one commit, as one."""
    about = common(runs)
    cases: dict[str, dict] = {}
    for run in runs:
        for case in run["cases"]:
            settings = cases.setdefault(case["name"], case | {"settings": {}})["settings"]
            for name, arms in case["settings"].items():
                settings[name] = settings.get(name, {}) | arms
    return about | {"cases": list(cases.values())}


def _row(setting: str, name: str, arms: dict[str, dict]) -> list[str]:
    arm, floor = arms[name], arms.get(FLOOR)
    share = f"{arm['tokens_per_second'] / floor['tokens_per_second']:.3f}" if floor else "-"
    peak = "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.1f}"
    return [
        ARMS[name][0], setting, f"{arm['tokens_per_second']:,.0f}", share,
        f"{(arm['q3'] - arm['q1']) / arm['median']:.1%}", peak, *(f"{loss:.4f}" for loss in arm["losses"]),
    ]  # fmt: skip


def markdown(results: dict) -> str:
    """A table for each model."""
    method = (
        f"{described(results)} Random weights and tokens, r = 16 on all linears of the blocks, the arms of one setting "
        f"taking their steps in turn: the median, and from the first to the third quartile as its spread. By "
        f"`{results['command']}`.\n"
    )
    lines = [method]
    for case in results["cases"]:
        rows = [
            _row(setting, name, arms)
            for setting, arms in case["settings"].items()
            for name in ARMS
            if name in arms
        ]  # fmt: skip
        lines += [f"### {case['name']}", "", *table(HEADER, rows), ""]
    return "\n".join(lines)


def write(results: dict, folder: Path) -> list[Path]:
    """models.md, models.json and, where matplotlib is installed, models.png; the paths."""
    texts = {"models.md": markdown(results), "models.json": as_json(results)}
    with_floor = any(FLOOR in arms for case in results["cases"] for arms in case["settings"].values())
    return write_files(folder, texts, {"models.png": lambda path: draw(results, path)} if with_floor else {})
