"""From batches with adapters of their own to files: adapters.json, adapters.md and adapters.png, and the same with
-few, -step and -cache of `python -m bench.adapters --few`, `--step` and `--cache`."""

from pathlib import Path

from .adapter_arms import ARMS
from .adapter_plot import draw
from .document import as_json, described, table, write_files
from .shapes import FORWARD, FORWARD_BACKWARD
from .timing import MOST_RESTS, REST
from .variants import FLOOR

CALLS = "calls"
TITLES = {
    FORWARD_BACKWARD: "Forward + backward, gradients of x and of all factors",
    FORWARD: "Inference",
    CALLS: "Inference, whole calls with the host's time (PEFT's cannot be captured: it makes indices in each)",
}
STEMS = {"linear": "adapters", "few": "adapters-few", "step": "adapters-step", "cache": "adapters-cache"}


def _pass_table(results: dict, pass_name: str) -> list[str]:
    """Of the floor its time, of the others theirs over it."""
    rows, names = [], [name for name in ARMS if any(_has(case["arms"], name, pass_name) for case in results["cases"])]
    for case in results["cases"]:
        arms = case["arms"]
        rows.append([case["name"], *(_cell(arms, name, pass_name) for name in names)])
    return table(["M, K, N: adapters", *(ARMS[name][0] for name in names)], rows) if names else []


def _has(arms: dict, name: str, pass_name: str) -> bool:
    return pass_name in arms.get(name, {}).get("seconds", {})


def _cell(arms: dict, name: str, pass_name: str) -> str:
    if not _has(arms, name, pass_name):
        return "-"
    median = arms[name]["seconds"][pass_name]["median"]
    if name == FLOOR or not _has(arms, FLOOR, pass_name):
        return f"{median * 1e6:,.0f} us"
    return f"{median / arms[FLOOR]['seconds'][pass_name]['median']:.3f}"


def _reasons(results: dict) -> list[str]:
    reasons = [
        f"* {ARMS[name][0].replace('*', '')}, {case['name']}: {arm['reason']}"
        for case in results["cases"]
        for name, arm in case["arms"].items()
        if "reason" in arm
    ]
    return ["No number:", "", *reasons, ""] if reasons else []


def _step_lines(step: dict) -> list[str]:
    def peak(arm: dict) -> str:
        return "-" if arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**30:.1f}"

    def rested(arm: dict) -> str:
        return "-" if arm["rested"] is None else f"{arm['rested']['median'] * 1e3:,.1f}"

    rows = [
        [label, f"{arm['tokens_per_second']:,.0f}", f"{arm['median'] * 1e3:,.1f}", rested(arm), peak(arm)]
        for label, arm in step["arms"].items()
    ]
    header = [step["name"], "tokens/s", "ms for all tasks", "ms of a card that rested", "peak GiB"]
    words = (
        "Forward, loss, backward and each task's AdamW; memory is what a step takes beyond the model, its adapters and "
        f"what their optimizers keep. A card that rested did nothing for {REST:.0f} s before each step; nothing was "
        f"zeroed, and rounds are {MOST_RESTS} at most."
    )
    return [words, "", *table(header, rows), ""]


def _cache_lines(cache: dict) -> list[str]:
    alone, moving = (arm["median"] for arm in cache["steps"].values())
    rows = [["an adapter", f"{cache['bytes'] / 2**20:,.1f} MiB"]]
    if "move" in cache:
        rates = [cache["bytes"] / cache[name] / 1e9 for name in ("copy", "move")]
        rows += [
            ["a plain copy of as many pinned bytes", f"{rates[0]:.1f} GB/s"],
            ["the cache's move into its slot", f"{rates[1]:.1f} GB/s, {rates[1] / rates[0]:.3f} of it"],
        ]
    rows += [
        ["a pass", f"{alone * 1e3:,.2f} ms"],
        ["a pass while an adapter moves", f"{moving * 1e3:,.2f} ms, {moving / alone:.3f} of it"],
        ["a switch to adapters that are there", f"{cache['switch'] * 1e6:,.0f} us of the host"],
    ]
    return [*table([cache["name"], ""], rows), ""]


def _method_of_cache(results: dict) -> str:
    return (
        f"{described(results)} Copies and moves one behind another, passes as whole calls and interleaved, "
        f"{results['flush_bytes'] // 2**20} MiB zeroed before each; medians of {results['rounds']} rounds. By "
        f"`{results['command']}`."
    )


def _method(results: dict) -> str:
    flush = f"{results['flush_bytes'] // 2**20} MiB zeroed before each step, " if results["flush_bytes"] else ""
    return (
        f"{described(results)} Random data, {flush}the ways interleaved in one process, median of {results['rounds']} "
        f"rounds. By `{results['command']}`."
    )


def markdown(results: dict) -> str:
    """All tables, and the reasons for missing numbers."""
    if results["kind"] == "step":
        return "\n".join([_method(results), "", *_step_lines(results["step"])])
    if results["kind"] == "cache":
        return "\n".join([_method_of_cache(results), "", *_cache_lines(results["cache"])])
    lines = [f"{_method(results)} Over the frozen linear's time in the same run.", ""]
    for pass_name, title in TITLES.items():
        rows = _pass_table(results, pass_name)
        lines += [f"### {title}", "", *rows, ""] if rows else []
    return "\n".join(lines + _reasons(results))


def write(results: dict, folder: Path) -> list[Path]:
    """The paths written; a picture of what has the frozen linear beside it."""
    stem = STEMS[results["kind"]]
    texts = {f"{stem}.md": markdown(results), f"{stem}.json": as_json(results)}
    drawn = any(FLOOR in case["arms"] for case in results["cases"])
    return write_files(folder, texts, {f"{stem}.png": lambda path: draw(results, TITLES, path)} if drawn else {})
