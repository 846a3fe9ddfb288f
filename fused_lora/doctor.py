"""python -m fused_lora.doctor: what this machine has, which backend runs, and what would be slow."""

import argparse
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__, backends, choices


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _software() -> list[tuple[str, str]]:
    return [
        ("fused_lora", f"{__version__}, in {Path(__file__).parent}"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU build'}"),
        ("triton", _installed("triton")),
        ("C compiler", backends.host_compiler() or "none"),
        ("extension", _said(lambda: backends.extension_obstacle() or f"built, {backends.extension().words}")),
    ]


def _said(ask: Callable[[], str]) -> str:
    """What a question is answered, or why it is refused."""
    try:
        return ask()
    except (ValueError, NotImplementedError) as error:
        return f"refused: {error}"


def _settings() -> list[tuple[str, str]]:
    """The package's variables."""
    forced = _said(lambda: f"FUSED_LORA_BACKEND={backends.forced_backend() or 'auto'}")
    autotune = _said(lambda: "on" if backends.autotune_enabled() else "off (FUSED_LORA_AUTOTUNE=1 measures tiles)")
    return [("forced", forced), ("autotune", autotune)]


def _devices() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())] or [torch.device("cpu")]


def _device_row(device: torch.device) -> tuple[str, str]:
    kind, dtype = ("bf16", torch.bfloat16) if device.type == "cuda" else ("fp32", torch.float32)

    def runs_on() -> str:
        choice = backends.choose(device, dtype)
        return f"{choice.name} ({choice.reason})"

    what = backends.describe(device) if device.type == "cuda" else "no GPU that torch can use"
    return str(device), f"{what}\n{'':12}{kind} runs on: {_said(runs_on)}"


def failures() -> list[str]:
    """What every layer will raise here."""
    rows = [*_settings(), *map(_device_row, _devices())]
    return list(dict.fromkeys(value.split("refused: ")[1] for _, value in rows if "refused: " in value))


def _guess(device: torch.device, name: str) -> str:
    count = len(choices.measured(device))
    found = f" (shapes so far: {count})" if count else ""
    return f"{device}: that {name} is the fastest is a guess for this card; {choices.COMMAND} measures it{found}"


def slow_points() -> list[str]:
    """What costs speed on this machine, each with what to do about it."""
    points = []
    if not torch.cuda.is_available():
        points.append(
            "no CUDA device: layers run in plain torch, right but no faster than an unfused LoRA, and small ones slower"
        )
        return points
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        choice = backends.choose(device, torch.bfloat16)
        if choice.name == "reference":
            points.append(f"{device}: plain torch, because {choice.reason}")
        elif choices.is_guess(device, choice.name):
            points.append(_guess(device, choice.name))
    if backends.precision(torch.float32) == "ieee":
        points.append(
            'float32 layers multiply off the tensor cores; torch.set_float32_matmul_precision("high") is TF32'
        )
    points.append("in_features or out_features that are no multiple of 8 leave the copy engine; explain() shows it")
    points.append("small batches wait for the host: torch.compile(mode='reduce-overhead') or CUDA graphs remove that")
    return points


def main(arguments: list[str] | None = None) -> int:
    """1 where every layer will raise."""
    argparse.ArgumentParser(prog="python -m fused_lora.doctor", description=__doc__).parse_args(arguments)
    rows = [*_software(), *map(_device_row, _devices()), *_settings()]
    print("\n".join(f"{name:<12}{value}" for name, value in rows))
    failing = failures()
    print("\nEvery layer will raise here:" if failing else "\nWhat would be slow here:")
    print("\n".join(f"  - {point}" for point in failing or slow_points()))
    return 1 if failing else 0


if __name__ == "__main__":
    sys.exit(main())
