"""From measured blocks of layers to files: blocks.json and blocks.md in one folder."""

from dataclasses import asdict
from pathlib import Path

from .block_ways import ALONE, NEIGHBOURS, WAYS, Block
from .document import as_json, table, write_files
from .report import method
from .shapes import FORWARD, FORWARD_BACKWARD
from .variants import FLOOR, PACKAGE

TITLES = {FORWARD_BACKWARD: "Forward + backward", FORWARD: "Forward"}
COMPILED = "torch.compile copies what is 5461 wide to padded rows, which is in the times of what is compiled here."
Measured = dict[Block, dict[str, dict]]


def _header() -> list[str]:
    """Of the ways as they are now: a card that is played has some of its own."""
    return ["", *(way.label for way in WAYS.values())]


def entry(block: Block, ways: dict[str, dict]) -> dict:
    """What results hold of a block."""
    return {"block": asdict(block), "ways": ways}


def measured(results: dict) -> Measured:
    """Results by block and way."""
    return {
        Block(**each["block"] | {"widths": tuple(each["block"]["widths"])}): each["ways"] for each in results["blocks"]
    }


def _times(ways: dict[str, dict], pass_name: str) -> dict[str, float]:
    return {name: way["seconds"][pass_name]["median"] for name, way in ways.items() if "seconds" in way}


def _ratio(times: dict[str, float], name: str, other: str) -> str:
    return f"{times[name] / times[other]:.2f}" if name in times and other in times else "-"


def _time_table(found: Measured, pass_name: str) -> list[str]:
    """Times in us, in brackets over the floor's; last the speed of the block as one over that of its layers alone."""
    rows = []
    for block, ways in found.items():
        times = _times(ways, pass_name)
        cells = [f"{times[n] * 1e6:,.0f} ({_ratio(times, n, FLOOR)})" if n in times else "-" for n in WAYS]
        rows.append([str(block), *cells, _ratio(times, ALONE, PACKAGE)])
    return table([*_header(), "fused over layer by layer"], rows)


def _memory_table(found: Measured) -> list[str]:
    def cell(way: dict) -> str:
        return f"{way['kept_bytes'] / 2**20:,.0f}" if "kept_bytes" in way else "-"

    rows = [[str(block), *(cell(ways.get(name, {})) for name in WAYS)] for block, ways in found.items()]
    return table(_header(), rows)


def _beside_neighbours(found: Measured) -> list[str]:
    """The speed of widths whose rows start anywhere, over that of widths beside them."""
    lines = []
    for odd, even in NEIGHBOURS.items():
        ours, theirs = (_times(found.get(block, {}), FORWARD_BACKWARD) for block in (odd, even))
        shares = [f"{theirs[n] / ours[n]:.1%}" for n in (PACKAGE, FLOOR) if n in ours and n in theirs]
        if len(shares) == 2:
            lines.append(f"* {odd}: {shares[0]} of the speed of {even} (frozen, {shares[1]})")
    return lines


def markdown(results: dict) -> str:
    """All tables, and the reasons for missing numbers."""
    found = measured(results)
    lines = [f"{method(results)} {COMPILED}", ""]
    for pass_name, title in TITLES.items():
        lines += [f"### {title}, us (in brackets over the frozen floor)", "", *_time_table(found, pass_name), ""]
    beside = _beside_neighbours(found)
    if beside:
        lines += ["Forward + backward of widths that are no multiple of 8:", "", *beside, ""]
    if any("kept_bytes" in way for ways in found.values() for way in ways.values()):
        lines += ["### What the forward pass keeps, with its outputs, MiB", "", *_memory_table(found), ""]
    reasons = [
        f"* {name}, {block}: {ways[name]['reason']}"
        for block, ways in found.items()
        for name in ways
        if "reason" in ways[name]
    ]
    return "\n".join([*lines, *(["No number:", "", *reasons, ""] if reasons else [])])


def write(results: dict, folder: Path) -> list[Path]:
    """The paths written."""
    return write_files(folder, {"blocks.md": markdown(results), "blocks.json": as_json(results)}, {})
