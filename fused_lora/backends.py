"""Which backend runs a call, and why: the only place that reads the device's capability or FUSED_LORA_* variables.

But for one question that every eager call asks, csrc's own (`chosen` in csrc/torch/eager_rules.cpp): asked here it took
2 us of a call's 37. Both hold the same rule.
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

from .extension import Extension, load

BACKENDS = ("cuda", "triton", "addmm", "reference")
CUDA_DTYPES = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*CUDA_DTYPES, torch.float32)
PLAYED = {"sm80": 80, "sm86": 86}


@dataclass(frozen=True)
class Choice:
    """A backend by name and the reason in words."""

    name: str
    reason: str


def forced_backend() -> str | None:
    """FUSED_LORA_BACKEND, one of auto (or unset), cuda, triton, addmm, reference."""
    value = os.environ.get("FUSED_LORA_BACKEND", "auto")
    if value not in ("auto", *BACKENDS):
        raise ValueError(f"FUSED_LORA_BACKEND must be one of auto, {', '.join(BACKENDS)}, got {value!r}")
    return None if value == "auto" else value


@contextmanager
def forcing(name: str) -> Iterator[None]:
    """FUSED_LORA_BACKEND for a while: to measure and to compare backends."""
    before = os.environ.get("FUSED_LORA_BACKEND", "auto")
    os.environ["FUSED_LORA_BACKEND"] = name
    try:
        yield
    finally:
        os.environ["FUSED_LORA_BACKEND"] = before


def autotune_enabled() -> bool:
    """FUSED_LORA_AUTOTUNE=1 measures tiles at first use and remembers them on disk."""
    value = os.environ.get("FUSED_LORA_AUTOTUNE", "0")
    if value not in ("0", "1"):
        raise ValueError(f"FUSED_LORA_AUTOTUNE must be 0 or 1, got {value!r}")
    return value == "1"


@cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def extension() -> Extension:
    """The CUDA extension. FUSED_LORA_ABI=stable takes the module that serves every torch: for tests, measurements."""
    abi = os.environ.get("FUSED_LORA_ABI", "auto")
    if abi not in ("auto", "stable"):
        raise ValueError(f"FUSED_LORA_ABI must be auto or stable, got {abi!r}")
    found = load(abi == "stable")
    if found.module is not None:
        found.module.play_as(played_capability() or 0)
    return found


def extension_obstacle() -> str | None:
    """Why the optional CUDA extension cannot be used, or None."""
    found = extension()
    return found.words if found.module is None else None


def has_extension() -> bool:
    """Whether the optional CUDA extension is built and loads."""
    return extension_obstacle() is None


def csrc():
    """The CUDA extension's module, where nothing stands in its way."""
    return extension().module


@cache
def eager_extension():
    """The same if it has autograd in C++, which gives None for calls that are not for it; else None."""
    return extension().module if extension().has_autograd else None


def played_capability() -> int | None:
    """FUSED_LORA_AS: sm80 or sm86, as which csrc and Triton's kernels see a card of compute capability 9.0; read once,
    for tests and measurements."""
    value = os.environ.get("FUSED_LORA_AS", "")
    if value not in ("", *PLAYED):
        raise ValueError(f"FUSED_LORA_AS must be one of {', '.join(PLAYED)}, got {value!r}")
    return PLAYED.get(value)


@cache
def interpreting() -> bool:
    """Whether Triton runs its kernels on the CPU (its own TRITON_INTERPRET)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def host_compiler() -> str | None:
    """Triton builds its launchers with this at first use."""
    names = (os.environ.get("CC"), "cc", "gcc", "clang")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def _played_by(device: torch.device) -> int | None:
    """Which capability a CUDA device plays. As in csrc/host/architecture.cpp, only one of 9.0 does."""
    played = played_capability()
    if played is None:
        return None
    properties = torch.cuda.get_device_properties(device)
    return played if (properties.major, properties.minor) == (9, 0) else None


def card_name(device: torch.device) -> str:
    """The name of a CUDA device, and what it plays."""
    played = _played_by(device)
    return torch.cuda.get_device_name(device) + (f" as sm{played}" if played else "")


def cache_file(what: str, device: torch.device) -> str:
    """A file of measurements, by GPU and versions, under FUSED_LORA_CACHE_DIR (~/.cache/fused_lora)."""
    versions = f"torch{torch.__version__}"
    if has_triton():
        import triton

        versions += f"-triton{triton.__version__}"
    folder = os.environ.get("FUSED_LORA_CACHE_DIR") or os.path.expanduser("~/.cache/fused_lora")
    name = re.sub(r"\W+", "-", card_name(device))
    return os.path.join(folder, f"{what}-{name}-{versions}.json")


@cache
def _gpu(device: torch.device, autotune: bool):
    from .kernels.tiles import KNOWN_GPUS, Gpu

    if interpreting() and device.type == "cpu":
        return KNOWN_GPUS["H100"]
    properties, played = torch.cuda.get_device_properties(device), _played_by(device)
    capability, shared_memory = 10 * properties.major + properties.minor, properties.shared_memory_per_block_optin
    if played:
        capability = played
        shared_memory = next(card.shared_memory for card in KNOWN_GPUS.values() if card.capability == played)
    return Gpu(
        capability, properties.multi_processor_count, shared_memory, cache_file("tiles", device) if autotune else None
    )


def gpu(device: torch.device):
    """The kernels' view of a CUDA device; under the interpreter, of an H100."""
    return _gpu(device, autotune_enabled())


def describe(device: torch.device) -> str:
    """A CUDA device in one line."""
    properties = torch.cuda.get_device_properties(device)
    return (
        f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} SMs, {properties.total_memory / 2**30:.0f} GiB, "
        f"{properties.shared_memory_per_block_optin // 1024} KB shared memory a block"
    )


def precision(dtype: torch.dtype) -> str:
    """How float32 operands multiply: "ieee", or "tf32" where torch's own matmul setting allows it."""
    allowed = dtype is torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


@cache
def _choose(device: torch.device, dtype: torch.dtype, forced: str | None) -> Choice:
    if forced in ("addmm", "reference"):
        return Choice(forced, f"FUSED_LORA_BACKEND={forced}")
    obstacles = {}
    for name, find_obstacle in (("cuda", _cuda_obstacle), ("triton", triton_obstacle)):
        if forced not in (None, name):
            continue
        obstacles[name] = find_obstacle(device, dtype)
        if obstacles[name] is None:
            return Choice(name, f"FUSED_LORA_BACKEND={forced}" if forced else f"{device.type} tensor of {dtype}")
    if forced:
        raise NotImplementedError(f"FUSED_LORA_BACKEND={forced} cannot run this call: {obstacles[forced]}")
    return Choice("reference", obstacles["triton"])


def _cuda_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return f"no kernel for device {device.type}"
    if dtype not in CUDA_DTYPES:
        return f"no kernel for {dtype}"
    if extension_obstacle() is not None:
        return extension_obstacle()
    properties = torch.cuda.get_device_properties(device)
    if properties.major != 8 and (properties.major, properties.minor) != (9, 0):
        return f"compute capability {properties.major}.{properties.minor} is neither 8.x nor 9.0"
    return None


def triton_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    if not interpreting() and (device.type != "cuda" or torch.version.hip):
        return f"no kernel for device {device.type}"
    if not has_triton():
        return "triton is not installed"
    if dtype not in TRITON_DTYPES:
        return f"no kernel for {dtype}"
    if interpreting():
        return None
    if gpu(device).capability < 80:
        return f"compute capability {gpu(device).capability / 10:.1f} is below 8.0"
    if host_compiler() is None:
        return "no C compiler (cc, gcc or clang) for Triton's launchers"
    return None


def choose(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend of a call on `device` with activations of `dtype`."""
    return _choose(device, dtype, forced_backend())


def _csrc_obstacle(r: int, readable: bool) -> str | None:
    unread = "weight is quantised, its columns are not adjacent or more than 2^22, or A and B have dtypes of their own"
    return csrc().rank_obstacle(r) or (None if readable else unread)


def lora_linear_obstacle(name: str, device: torch.device, dtype: torch.dtype, r: int, readable: bool) -> str | None:
    """Why a backend cannot run a LoRA linear, or None; as choose_lora_linear."""
    if name == "cuda":
        return _cuda_obstacle(device, dtype) or _csrc_obstacle(r, readable)
    if name == "triton":
        return triton_obstacle(device, dtype)
    return None if name in BACKENDS else f"there is no backend {name}"


@cache
def _choose_lora_linear(device: torch.device, dtype: torch.dtype, r: int, readable: bool, forced: str | None) -> Choice:
    choice = _choose(device, dtype, forced)
    if choice.name != "cuda":
        return choice
    obstacle = _csrc_obstacle(r, readable)
    if obstacle is None:
        return choice
    if forced:
        raise NotImplementedError(f"FUSED_LORA_BACKEND=cuda cannot run this call: {obstacle}")
    for_triton = triton_obstacle(device, dtype)
    if for_triton is None:
        return Choice("triton", f"csrc's kernels do not take it: {obstacle}")
    return Choice("reference", f"csrc's kernels do not take it: {obstacle}; nor does Triton: {for_triton}")


def choose_lora_linear(device: torch.device, dtype: torch.dtype, r: int, readable: bool = True) -> Choice:
    """The backend of a LoRA linear of rank r, activations of `dtype`; readable as by choices.csrc_reads."""
    return _choose_lora_linear(device, dtype, r, readable, forced_backend())


def csrc_tile(device: torch.device, M: int, N: int, r: int) -> dict[str, int]:
    """The tile of csrc's kernel for an (M, N) result."""
    with torch.cuda.device(device):
        return dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), csrc().tile(M, N, r), strict=True))


def choose_merge(device: torch.device, dtype: torch.dtype) -> Choice:
    """The backend of an in-place merge: Triton, and only where it cannot run the CUDA extension, if that was built.

    The extension is the second choice: (4096, 4096) bf16 on an H100, Triton takes 35 us at r = 16 and 46 at 128.
    """
    forced = forced_backend()
    if forced in ("triton", "reference"):
        return choose(device, dtype)
    can_extend = device.type == "cuda" and dtype in TRITON_DTYPES and has_extension()
    if forced == "cuda":
        return Choice("cuda", "FUSED_LORA_BACKEND=cuda") if can_extend else choose(device, dtype)
    obstacle = triton_obstacle(device, dtype)
    if obstacle is None:
        return Choice("triton", f"{device.type} tensor of {dtype}")
    return Choice("cuda" if can_extend else "reference", obstacle)
