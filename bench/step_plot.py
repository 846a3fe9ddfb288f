"""steps.png: a group of bars for each model and mode, each bar an arm's tokens a second over full-rank training's."""

from pathlib import Path

from .plot import COLORS, DASHED, INK, draw_frame, draw_limit
from .step_arms import ARMS
from .step_cases import FULL, Case, flops
from .variants import FLOOR, PACKAGE

BARS = [name for name in ARMS if name not in (FULL, FLOOR)]
FLOOR_COLOR = COLORS[FULL]  # which is a line here


def _draw_group(axes, center: float, case: Case, arms: dict[str, dict]) -> None:
    full = arms[FULL]["tokens_per_second"]
    names = [name for name in (*BARS, FLOOR) if name in arms]
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        speed, x = arms[name]["tokens_per_second"] / full, center + (i - (len(names) - 1) / 2) * width
        axes.bar(x, speed, width * 0.92, color=COLORS.get(name, FLOOR_COLOR), zorder=2)
        if name == PACKAGE:
            axes.text(
                x, speed + 0.02, f"{speed:.2f}", ha="center", va="bottom", fontsize=9, fontweight="bold",
                color=COLORS[PACKAGE], zorder=5, bbox={"color": "white", "pad": 0.5},
            )  # fmt: skip
    draw_limit(axes, center, flops(case, FULL) / flops(case, PACKAGE))


def _legend(axes, names: list[str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS.get(name, FLOOR_COLOR), label=ARMS[name][0].replace("*", "")) for name in names]
    handles += [
        Line2D([], [], color=INK, linewidth=1.4, label="full-rank training"),
        Line2D([], [], label="ReLoRA's ceiling, by FLOPs", **DASHED),
    ]
    axes.legend(handles=handles, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.02), frameon=False, fontsize=9)


def draw(measured: list[tuple[Case, dict[str, dict]]], about: dict, path: Path) -> None:
    """Writes the PNG of what has full-rank training beside it: (case, results by mode and arm). ModuleNotFoundError
    without matplotlib."""
    from matplotlib.figure import Figure

    groups = [(case, mode, arms) for case, by_mode in measured for mode, arms in by_mode.items() if FULL in arms]
    figure = Figure(figsize=(max(9.0, 1.5 * len(groups) + 1), 5.2), layout="constrained")
    axes = figure.subplots()
    for i, (case, _, arms) in enumerate(groups):
        _draw_group(axes, i, case, arms)
    draw_frame(axes, [f"{case.preset}\n{mode}" for case, mode, _ in groups])
    axes.set_ylabel("tokens a second / full-rank training's", fontsize=10)
    _legend(axes, [name for name in (*BARS, FLOOR) if any(name in arms for *_, arms in groups)])
    figure.suptitle(f"Whole training steps: {about['device']}, {about['dtype']}", fontsize=12)
    figure.savefig(path, dpi=150)
