"""python -m fused_lora.doctor: what this machine has, which backend runs, and what would be slow."""

import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from . import __version__, backends


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _software() -> list[tuple[str, str]]:
    return [
        ("fused_lora", __version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none: a CPU build'}"),
        ("triton", _installed("triton")),
        ("C compiler", backends.host_compiler() or "none"),
        ("extension", backends.extension_obstacle() or "built"),
    ]


def _gpu_lines(index: int) -> tuple[str, str]:
    device = torch.device("cuda", index)
    choice = backends.choose(device, torch.bfloat16)
    return str(device), (f"{backends.describe(device)}\n{'':12}bf16 runs on: {choice.name} ({choice.reason})")


def slow_points() -> list[str]:
    """What costs speed on this machine, each with what to do about it."""
    points = []
    if not torch.cuda.is_available():
        points.append("no CUDA device: layers run in plain torch, right but no faster than an unfused LoRA")
        return points
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        choice = backends.choose(device, torch.bfloat16)
        if choice.name == "reference":
            points.append(f"{device}: plain torch, because {choice.reason}")
        elif not backends.gpu(device).has_tma:
            points.append(
                f"{device}: pointer kernels (no TMA); their tiles were compiled for, not measured on, such cards"
            )
    if backends.precision(torch.float32) == "ieee":
        points.append(
            'float32 layers multiply off the tensor cores; torch.set_float32_matmul_precision("high") is TF32'
        )
    points.append("in_features or out_features that are no multiple of 8 leave the copy engine; explain() shows it")
    points.append("small batches wait for the host: torch.compile(mode='reduce-overhead') or CUDA graphs remove that")
    return points


def main() -> None:
    rows = _software()
    if torch.cuda.is_available():
        rows += [_gpu_lines(index) for index in range(torch.cuda.device_count())]
    else:
        rows.append(("GPU", "none that torch can use"))
    rows.append(("forced", f"FUSED_LORA_BACKEND={backends.forced_backend() or 'auto'}"))
    rows.append(("autotune", "on" if backends.autotune_enabled() else "off (FUSED_LORA_AUTOTUNE=1 measures tiles)"))
    print("\n".join(f"{name:<12}{value}" for name, value in rows))
    print("\nWhat would be slow here:")
    print("\n".join(f"  - {point}" for point in slow_points()))


if __name__ == "__main__":
    main()
