"""What is written down about a measurement: environment, floors, medians, ratios. Plain dicts, ready for JSON."""

import datetime
import functools
import platform
import re
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import fused_lora
from fused_lora import backends, explain

from .measure import MEASURED, WRONG, Measurements
from .shapes import PASSES, Shape, byte_floor, flop_floor, flops, least_bytes
from .timing import FLUSH_BYTES
from .variants import FLOOR

RESULTS = Path(__file__).parent / "results"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def device_name(device: torch.device) -> str:
    """The GPU's name and the card that it plays, or the processor's architecture."""
    if device.type == "cuda":
        return backends.card_name(device)
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads"


def slug(device: torch.device) -> str:
    """A folder name: nvidia-h100-80gb-hbm3, nvidia-h200-as-sm80, or cpu."""
    if device.type != "cuda":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def _git(*arguments: str) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()


@functools.cache
def _commit() -> str | None:
    """Of the checkout that this is, with "-dirty" where more than results has changed since."""
    try:
        commit = _git("rev-parse", "--short", "HEAD")
        changed = _git("diff", "--name-only", "HEAD", "--", ":/", f":(exclude){RESULTS.name}")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty" if changed else commit


def circumstances(device: torch.device, dtype: torch.dtype) -> dict:
    """Device, versions, commit and date: what a time means nothing without."""
    return {
        "device": device_name(device),
        "dtype": str(dtype).removeprefix("torch."),
        "date": datetime.date.today().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": _version("triton"),
            "peft": _version("peft"),
            "fused_lora": fused_lora.__version__,
        },
        "commit": _commit(),
    }


def environment(device: torch.device, dtype: torch.dtype, rounds: int) -> dict:
    """The circumstances, and the method."""
    return circumstances(device, dtype) | {
        "rounds": rounds,
        "flush_bytes": FLUSH_BYTES if device.type == "cuda" else 0,
    }


def tiles(measurements: Measurements, shape: Shape) -> dict:
    """What fused_lora launches: its backend and, for Triton, each kernel's tile, by fused_lora.explain."""
    explanation = explain(
        tokens=shape.M,
        in_features=shape.K,
        out_features=shape.N,
        r=shape.r,
        dtype=measurements.dtype,
        device=measurements.device,
    )
    launches = explanation.forward + explanation.backward
    return {
        "backend": explanation.backend,
        "kernels": [
            {"name": name, "programs": programs} | {key: meta[key] for key in meta if key.startswith(("BLOCK", "num"))}
            for name, programs, meta in launches
        ],
    }


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """(first quartile, median, third quartile), in the unit of the samples."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    q1, _, q3 = statistics.quantiles(samples, n=4, method="inclusive")
    return q1, statistics.median(samples), q3


def summary(samples: list[float]) -> dict:
    """Seconds: median, quartiles and count, and the samples themselves."""
    q1, median, q3 = quartiles(samples)
    return {"median": median, "q1": q1, "q3": q3, "count": len(samples), "samples": samples}


def case(measurements: Measurements, shape: Shape, pass_name: str, mode: str, name: str) -> dict:
    """One variant's times in microseconds, its rate, and its median over the frozen floor's of the same rounds.

    tflops counts the operations that the variant's work needs (see shapes.py), not those that it happens to do.
    """
    outcomes = measurements.outcomes(shape, pass_name, mode)
    outcome, floor = outcomes[name], outcomes.get(FLOOR)
    if outcome.status != MEASURED:
        return {"status": outcome.status, "reason": outcome.reason}
    work = measurements.variants[name].work
    operations = flops(shape, pass_name, work)
    q1, median, q3 = quartiles(outcome.samples)
    measured_floor = floor is not None and floor.status == MEASURED
    return {
        "status": MEASURED,
        "median_us": median * 1e6,
        "q1_us": q1 * 1e6,
        "q3_us": q3 * 1e6,
        "count": len(outcome.samples),
        "ratio": median / quartiles(floor.samples)[1] if measured_floor else None,
        "flops": operations,
        "bytes": least_bytes(shape, pass_name, measurements.dtype.itemsize, work),
        "tflops": operations / median * 1e-12,
        "samples_us": [round(sample * 1e6, 3) for sample in outcome.samples],
    }


def memory(measurements: Measurements, shape: Shape) -> dict[str, dict]:
    """Peak memory of forward and backward: bytes; above the frozen floor's in MB (10^6 bytes) and in units of M r
    elements of x's dtype. Empty on a CPU."""
    peaks = measurements.prepared(shape).memory
    if FLOOR not in peaks:
        return {}
    unit = shape.M * shape.r * measurements.dtype.itemsize
    above = {name: peak - peaks[FLOOR] for name, peak in peaks.items()}
    return {name: {"peak": peaks[name], "MB": extra / 1e6, "Mr": extra / unit} for name, extra in above.items()}


def skipped_record(shape: Shape, reason: str) -> dict:
    """A shape that was not measured, and why."""
    return {"shape": asdict(shape), "name": str(shape), "skipped": reason}


def shape_record(measurements: Measurements, shape: Shape) -> dict:
    """Everything about one shape, measured now unless it has been."""
    return {
        "shape": asdict(shape),
        "name": str(shape),
        "skipped": None,
        "floors": {
            pass_name: {"flops": flop_floor(shape, pass_name), "bytes": byte_floor(shape, pass_name)}
            for pass_name in PASSES
        },
        "errors": measurements.prepared(shape).errors,
        "memory": memory(measurements, shape),
        "fused_lora": tiles(measurements, shape),
        "kernels": {name: variant.kernels for name, variant in measurements.prepared(shape).ready.items()},
        "times": {
            mode: {
                pass_name: {name: case(measurements, shape, pass_name, mode, name) for name in measurements.variants}
                for pass_name in PASSES
            }
            for mode in measurements.modes
        },
    }


def is_sound(records: list[dict], package: str) -> bool:
    """Whether no variant was wrong and the package has a time in every case that was not skipped."""
    cases = [
        (name, outcome["status"])
        for record in records
        for passes in record.get("times", {}).values()
        for outcomes in passes.values()
        for name, outcome in outcomes.items()
    ]
    return all(status == MEASURED if name == package else status != WRONG for name, status in cases)
