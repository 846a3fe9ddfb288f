"""Tables of blocks of layers."""

import statistics

from .block_ways import ALONE, NEIGHBOURS, WAYS, Block
from .report import method, table
from .shapes import FORWARD, FORWARD_BACKWARD
from .variants import FLOOR, PACKAGE

Results = dict[Block, dict[str, dict]]
TITLES = {FORWARD_BACKWARD: "Forward + backward", FORWARD: "Forward"}
HEADER = ["", *(way.label for way in WAYS.values())]


def _time(ways: dict[str, dict], name: str, pass_name: str) -> float:
    return statistics.median(ways[name]["seconds"][pass_name])


def _time_table(results: Results, pass_name: str) -> list[str]:
    """Times in us, in brackets over the floor's; last the speed of the block as one over that of its layers alone."""
    lines = []
    for block, ways in results.items():
        times = {name: _time(ways, name, pass_name) for name in ways}
        cells = [f"{times[n] * 1e6:,.0f} ({times[n] / times[FLOOR]:.2f})" if n in ways else "-" for n in WAYS]
        gain = f"{times[ALONE] / times[PACKAGE]:.2f}" if ALONE in ways else "-"
        lines.append([str(block), *cells, gain])
    return table([*HEADER, "fused over layer by layer"], lines)


def _memory_table(results: Results) -> list[str]:
    lines = [
        [str(block), *(f"{ways[name]['kept_bytes'] / 2**20:,.0f}" if name in ways else "-" for name in WAYS)]
        for block, ways in results.items()
    ]
    return table(HEADER, lines)


def _beside_neighbours(results: Results) -> list[str]:
    """The speeds of widths whose rows start anywhere, over those of widths beside them."""
    lines = []
    for odd, even in NEIGHBOURS:
        if odd in results and even in results:
            ours, floors = (
                _time(results[even], name, FORWARD_BACKWARD) / _time(results[odd], name, FORWARD_BACKWARD)
                for name in (PACKAGE, FLOOR)
            )
            lines.append(f"* {odd}: {ours:.1%} of the speed of {even} (frozen, {floors:.1%})")
    return lines


def markdown(results: Results, about: dict) -> str:
    """All tables."""
    lines = [method(about), ""]
    for pass_name, title in TITLES.items():
        lines += [f"### {title}, us (in brackets over the frozen floor)", "", *_time_table(results, pass_name), ""]
    beside = _beside_neighbours(results)
    if beside:
        lines += ["Forward + backward of widths that are no multiple of 8:", "", *beside, ""]
    if all("kept_bytes" in way for ways in results.values() for way in ways.values()):
        lines += ["### What the forward pass keeps, with its outputs, MiB", "", *_memory_table(results), ""]
    return "\n".join(lines)
