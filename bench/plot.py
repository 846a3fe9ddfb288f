"""forward_backward.png: a group of bars a shape, each bar a variant's time over the frozen floor's."""

from pathlib import Path

from .shapes import FORWARD_BACKWARD
from .timing import GRAPH
from .variants import FLOOR, PACKAGE

# Bars above this are cut, their value written on them.
CEILING = 3.0
COLORS = {
    PACKAGE: "#d9480f",
    "fused_lora_dropout": "#ec8453",
    "fused_lora_dora": "#b8860b",
    "fused_lora_triton": "#f4bf9c",
    "addmm": "#8fb8de",
    "merged_weight": "#4f8fc9",
    "compiled": "#2b628f",
    "unfused": "#a9c9a4",
    "peft": "#6fa368",
    "peft_fp32": "#3f7040",
    "peft_dora": "#8a9a3c",
    "full_rank": "#b0aca6",
    "one": "#f4bf9c",
    "triton": "#c2785a",
    "grouped": "#8fb8de",
    "gathered": "#2b628f",
    "loop": "#a9c9a4",
    "accelerated": "#ec8453",
}
INK, FAINT = "#2b2b2b", "#d8d8d8"
DASHED = {"color": INK, "linewidth": 1.4, "linestyle": (0, (3, 1.5))}


def draw_bar(axes, x: float, width: float, name: str, outcome: dict) -> None:
    """An arm's ratio, or its status where there is none."""
    ratio = outcome.get("ratio")
    if ratio is None:
        axes.text(x, 0.04, outcome["status"], rotation=90, ha="center", va="bottom", fontsize=7, color=INK)
        return
    axes.bar(x, min(ratio, CEILING), width * 0.92, color=COLORS.get(name, "#888888"), zorder=2)
    if ratio > CEILING:
        axes.text(
            x, CEILING - 0.06, f"{ratio:.1f}", rotation=90, ha="center", va="top", fontsize=8, color="white", zorder=4
        )
        axes.plot([x - width * 0.46, x + width * 0.46], [CEILING - 0.03] * 2, color="white", linewidth=1.5, zorder=3)
    elif name == PACKAGE:
        axes.text(
            x + width / 2, ratio + 0.03, f"{ratio:.2f}", ha="right", va="bottom", fontsize=9, fontweight="bold",
            color=COLORS[PACKAGE], zorder=5,
        )  # fmt: skip


def _draw_group(axes, center: float, record: dict, names: list[str], mode: str) -> None:
    width = 0.84 / len(names)
    outcomes = record["times"][mode][FORWARD_BACKWARD]
    for i, name in enumerate(names):
        draw_bar(axes, center + (i - (len(names) - 1) / 2) * width, width, name, outcomes[name])
    floor = record["floors"][FORWARD_BACKWARD]["flops"]
    draw_limit(axes, center, floor)


def draw_limit(axes, center: float, height: float) -> None:
    """A dashed line across a group of bars."""
    axes.plot([center - 0.45, center + 0.45], [height] * 2, zorder=4, **DASHED)


def draw_frame(axes, ticks: list[str]) -> None:
    """A line at 1, and a tick for each group of bars."""
    axes.axhline(1, color=INK, linewidth=1.4, zorder=4)
    axes.set_xticks(range(len(ticks)), ticks, fontsize=9)
    axes.set_xlim(-0.55, len(ticks) - 0.45)
    axes.tick_params(length=0)
    axes.grid(axis="y", color=FAINT, linewidth=0.7, zorder=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(axes, names: list[str], labels: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles = [Patch(color=COLORS.get(name, "#888888"), label=labels[name].replace("*", "")) for name in names]
    handles += [
        Line2D([], [], color=INK, linewidth=1.4, label="frozen floor: no adapter"),
        Line2D([], [], label="FLOP floor", **DASHED),
    ]
    axes.legend(
        handles=handles, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.02), frameon=False, fontsize=9,
        columnspacing=1.6, handlelength=1.6,
    )  # fmt: skip


def draw(results: dict, path: Path) -> None:
    """Writes the PNG: kernel times where there are some, else whole calls. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure

    records = [record for record in results["shapes"] if not record["skipped"]]
    mode = next((mode for record in records for mode in record["times"]), GRAPH)
    names = [name for name in results["variants"] if name != FLOOR]
    figure = Figure(figsize=(max(13.0, 2.0 * len(records) + 1), 5.6), layout="constrained")
    axes = figure.subplots()
    for i, record in enumerate(records):
        _draw_group(axes, i, record, names, mode)
    draw_frame(axes, ["{M} tokens\n{K} -> {N}\nr = {r}".format(**record["shape"]) for record in records])
    axes.set_ylim(0, CEILING + 0.05)
    axes.set_ylabel("time / frozen linear's time", fontsize=10)
    _legend(axes, names, results["variants"])
    about = results["environment"]
    kind = "kernel time" if mode == GRAPH else "whole call"
    figure.suptitle(f"LoRA linear, forward + backward, {kind}: {about['device']}, {about['dtype']}", fontsize=12)
    figure.savefig(path, dpi=150)
