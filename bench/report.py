"""From measurements to files: results.json, table.md and forward_backward.png in one folder."""

from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch

from .document import as_json, described, table, write_files
from .measure import MEASURED, UNAVAILABLE, WRONG, Measurements
from .plot import draw
from .record import environment, shape_record, skipped_record
from .shapes import FORWARD, FORWARD_BACKWARD, PASSES, Shape
from .timing import EAGER, GRAPH, HOST
from .variants import FLOOR, PACKAGE

TITLES = {
    (GRAPH, FORWARD_BACKWARD): "Forward + backward, kernel time (CUDA graph)",
    (GRAPH, FORWARD): "Forward, kernel time (CUDA graph)",
    (EAGER, FORWARD_BACKWARD): "Forward + backward, whole call (eager, host time included)",
    (EAGER, FORWARD): "Forward, whole call (eager, host time included)",
    (HOST, FORWARD_BACKWARD): "Forward + backward, host time alone",
    (HOST, FORWARD): "Forward, host time alone",
}


def _collect_shape(measurements: Measurements, shape: Shape, on_progress: Callable[[str], None]) -> dict:
    obstacle = measurements.obstacle(shape)
    try:
        for pass_name in PASSES if obstacle is None else ():
            for mode in measurements.modes:
                on_progress(f"{shape} {pass_name} {mode}")
                measurements.outcomes(shape, pass_name, mode)
    except torch.OutOfMemoryError as error:
        obstacle = f"{shape}: {str(error).splitlines()[0]}"
    return skipped_record(shape, obstacle) if obstacle else shape_record(measurements, shape)


def collect(
    measurements: Measurements,
    shapes: tuple[Shape, ...],
    on_progress: Callable[[str], None],
    on_shape: Callable[[dict], object] = lambda results: None,
) -> dict:
    """Measures every shape; on_progress hears of each (pass, mode) before it starts, on_shape gets what there is after
    each shape. One dict, ready for JSON."""
    results = {
        "environment": environment(measurements.device, measurements.dtype, measurements.rounds),
        "variants": {name: kind.label for name, kind in measurements.variants.items()},
        "shapes": [],
    }
    for shape in shapes:
        results["shapes"].append(_collect_shape(measurements, shape, on_progress))
        on_shape(results)
    return results


def _measured_shapes(results: dict) -> list[dict]:
    return [record for record in results["shapes"] if not record["skipped"]]


def _title(record: dict) -> str:
    return ", ".join(str(record["shape"][size]) for size in ("M", "K", "N", "r"))


def _ratio_cell(outcome: dict) -> str:
    if outcome["status"] == WRONG:
        return "wrong"
    return f"{outcome['ratio']:.2f}" if outcome.get("ratio") else "-"


def _floor_cell(outcome: dict) -> str:
    return f"1 ({outcome['median_us']:.0f} us)" if outcome["status"] == MEASURED else "-"


def ratio_table(results: dict, mode: str, pass_name: str) -> list[str]:
    """Lines of Markdown: variants by shapes, medians over the frozen floor's in this run; the floor's own in us."""
    records = _measured_shapes(results)
    outcomes = [record["times"][mode][pass_name] for record in records]
    rows = [["FLOP floor", *(f"{record['floors'][pass_name]['flops']:.3f}" for record in records)]]
    for name, label in results["variants"].items():
        cell = _floor_cell if name == FLOOR else _ratio_cell
        rows.append([label, *(cell(shape_outcomes[name]) for shape_outcomes in outcomes)])
    return table(["M, K, N, r", *map(_title, records)], rows)


def memory_table(results: dict) -> list[str]:
    """Lines of Markdown: peak memory of forward + backward above the frozen floor's, MB and units of M r elements."""
    records = _measured_shapes(results)
    rows = []
    for name, label in results["variants"].items():
        cells = [record["memory"].get(name) for record in records]
        rows.append([label, *(f"{cell['MB']:.0f} ({cell['Mr']:.1f})" if cell else "-" for cell in cells)])
    return table(["M, K, N, r", *map(_title, records)], rows)


def _spent(passes: dict, name: str) -> dict[str, tuple[float, int, int]] | None:
    """(us, FLOPs, bytes) of a variant's forward and, by difference, of its backward; None where one has no time."""
    keys = ("median_us", "flops", "bytes")
    forward, both = ([passes[pass_name][name].get(key) for key in keys] for pass_name in PASSES)
    if None in forward + both:
        return None
    return {"forward": tuple(forward), "backward": tuple(b - f for f, b in zip(forward, both, strict=True))}


def account_table(results: dict) -> list[str]:
    """Lines of Markdown: each pass of this package against what its FLOPs would take at the frozen linear's rate, and
    the rate at which it moves the bytes that any implementation must. The backward is the difference of two medians."""
    rows = []
    for record in _measured_shapes(results):
        own, frozen = (_spent(record["times"][GRAPH], name) for name in (PACKAGE, FLOOR))
        for name in own if own and frozen else ():
            (us, flops, moved), (frozen_us, frozen_flops, _) = own[name], frozen[name]
            over = us / (frozen_us * flops / frozen_flops)
            rates = f"{flops / us * 1e-6:.0f}", f"{over:.3f}", f"{moved / us * 1e-6:.2f}"
            rows.append([_title(record), name, f"{us:.0f}", *rates])
    return table(["M, K, N, r", "pass", "us", "TFLOP/s", "over its FLOP floor", "least bytes, TB/s"], rows)


def kernel_table(results: dict) -> list[str]:
    """Lines of Markdown: products by shapes, the kernels that a variant has chosen for them; empty if none has."""
    records = _measured_shapes(results)
    by_shape = [dict(chain(*(chosen.items() for chosen in record.get("kernels", {}).values()))) for record in records]
    products = dict.fromkeys(chain(*by_shape))
    rows = [[product, *(chosen.get(product, "-") for chosen in by_shape)] for product in products]
    return table(["M, K, N, r", *map(_title, records)], rows) if rows else []


def reasons(results: dict) -> list[str]:
    """Lines of Markdown: why a shape or a variant has no number, each reason once."""
    found = {}
    for record in results["shapes"]:
        if record["skipped"]:
            found[record["skipped"]] = None
            continue
        for mode, passes in record["times"].items():
            for outcomes in passes.values():
                for name, outcome in outcomes.items():
                    if outcome["status"] != MEASURED:
                        where = name if outcome["status"] == UNAVAILABLE else f"{name}, {record['name']}, {mode}"
                        found[f"{where}: {outcome['reason']}"] = None
    return [f"* {text}" for text in found]


def method(about: dict) -> str:
    """How it was measured, and on what."""
    flush = f"cold L2 ({about['flush_bytes'] // 2**20} MiB zeroed before each step), " if about["flush_bytes"] else ""
    return (
        f"{described(about)} Random data, {flush}variants interleaved in one process, median of {about['rounds']} "
        "rounds. Ratios to the frozen floor of the same run: the same with W frozen and no adapter. The forward keeps "
        "what its backward needs."
    )


def markdown(results: dict) -> str:
    """All tables, forward + backward first, and the reasons for missing numbers."""
    lines = [method(results["environment"]), ""]
    records = _measured_shapes(results)
    for (mode, pass_name), title in TITLES.items():
        if records and mode in records[0]["times"]:
            lines += [f"### {title}", "", *ratio_table(results, mode, pass_name), ""]
    if records and GRAPH in records[0]["times"]:
        lines += ["### Account of fused_lora's kernels", "", *account_table(results), ""]
    if any(record["memory"] for record in records):
        title = "Peak memory of forward + backward above the frozen floor's, MB (units of M r elements)"
        lines += [f"### {title}", "", *memory_table(results), ""]
    chosen = kernel_table(results)
    if chosen:
        lines += ["### cuBLAS's kernels, the fastest found: tile_depth x stages", "", *chosen, ""]
    missing = reasons(results)
    if missing:
        lines += ["No number (`-`) or a wrong result:", "", *missing, ""]
    return "\n".join(lines)


def write(results: dict, folder: Path) -> list[Path]:
    """results.json, table.md and, where matplotlib is installed, forward_backward.png; the paths written."""
    texts = {"results.json": as_json(results), "table.md": markdown(results)}
    return write_files(folder, texts, {"forward_backward.png": lambda path: draw(results, path)})
