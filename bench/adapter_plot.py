"""adapters.png: a row for each pass, in it a group of bars for each batch: an arm's time over the frozen linear's."""

import textwrap
from pathlib import Path

from .adapter_arms import ARMS
from .plot import CEILING, COLORS, draw_bar, draw_frame
from .variants import FLOOR


def _ratios(arms: dict[str, dict], pass_name: str) -> dict[str, float]:
    medians = {
        name: arm["seconds"][pass_name]["median"] for name, arm in arms.items() if pass_name in arm.get("seconds", {})
    }
    return {name: median / medians[FLOOR] for name, median in medians.items() if name != FLOOR and FLOOR in medians}


def draw(results: dict, titles: dict[str, str], path: Path) -> None:
    """Writes the PNG of the passes that have been timed. ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    of_passes = {each: [_ratios(case["arms"], each) for case in results["cases"]] for each in titles}
    of_passes = {each: cases for each, cases in of_passes.items() if any(cases)}
    names = [name for name in ARMS if any(name in case for cases in of_passes.values() for case in cases)]
    if not names:
        return
    figure = Figure(figsize=(13, 3.2 * len(of_passes) + 1), layout="constrained")
    ticks = ["\n".join(textwrap.wrap(case["name"], 24)) for case in results["cases"]]
    for axes, (each, cases) in zip(
        figure.subplots(len(of_passes), squeeze=False)[:, 0], of_passes.items(), strict=True
    ):
        width = 0.86 / len(names)
        for i, case in enumerate(cases):
            for place, name in enumerate(names):
                if name in case:
                    draw_bar(axes, i + (place - (len(names) - 1) / 2) * width, width, name, {"ratio": case[name]})
        draw_frame(axes, ticks)
        axes.set_ylim(0, CEILING + 0.05)
        axes.set_title(titles[each], fontsize=10, loc="left")
        axes.set_ylabel("of the frozen\nlinear's time", fontsize=9)
    handles = [Patch(color=COLORS[name], label=ARMS[name][0].replace("*", "")) for name in names]
    figure.legend(handles=handles, ncols=4, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle(f"Rows with adapters of their own: {results['device']}, {results['dtype']}", fontsize=12)
    figure.savefig(path, dpi=150)
