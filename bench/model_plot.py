"""models.png: a row for each setting, in it a group of bars for each model: tokens a second over the frozen model's."""

from pathlib import Path

from .model_arms import ARMS
from .plot import COLORS, draw_frame
from .variants import FLOOR, PACKAGE

SHOWN = {
    "peft_fp32": COLORS["peft_fp32"],
    "peft": COLORS["peft"],
    "accelerated_fp32": "#f4bf9c",
    "accelerated": "#ec8453",
    "replaced": COLORS[PACKAGE],
}


def _draw_group(axes, center: float, arms: dict[str, dict]) -> None:
    names = [name for name in SHOWN if name in arms]
    width = 0.86 / max(len(names), 1)
    for i, name in enumerate(names):
        share = arms[name]["tokens_per_second"] / arms[FLOOR]["tokens_per_second"]
        x = center + (i - (len(names) - 1) / 2) * width
        axes.bar(x, share, width * 0.92, color=SHOWN[name], zorder=2)
        axes.text(x, share - 0.02, f"{share:.2f}", rotation=90, ha="center", va="top", fontsize=8, color="white")


def draw(results: dict, path: Path) -> None:
    """Writes the PNG of what has the frozen model beside it. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    settings = [
        name for name in results["settings"]
        if any(FLOOR in case["settings"].get(name, {}) for case in results["cases"])
    ]  # fmt: skip
    figure = Figure(figsize=(11, 2.6 * len(settings) + 1), layout="constrained")
    for axes, setting in zip(figure.subplots(len(settings), squeeze=False)[:, 0], settings, strict=True):
        cases = [case for case in results["cases"] if FLOOR in case["settings"].get(setting, {})]
        for i, case in enumerate(cases):
            _draw_group(axes, i, case["settings"][setting])
        draw_frame(axes, [case["short"] for case in cases])
        axes.set_title(setting, fontsize=10, loc="left")
        axes.set_ylabel("of the frozen\nmodel's speed", fontsize=9)
    handles = [Patch(color=color, label=ARMS[name][0].replace("*", "")) for name, color in SHOWN.items()]
    figure.legend(handles=handles, ncols=3, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle(f"Training with LoRA, tokens a second: {results['device']}, {results['dtype']}", fontsize=12)
    figure.savefig(path, dpi=150)
