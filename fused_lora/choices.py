"""Which backend a LoRA linear gets: the fastest by what fused_lora.tune has measured on its device, else backends.py's
choice; and whether several linears are one launch.

Times lie in a file that is read when a process first asks, by buckets of shapes, as the measured tiles.
"""

import math
from collections.abc import Sequence
from functools import cache
from operator import itemgetter

import torch

from . import backends
from .backends import Choice
from .formats import Stored
from .measured_file import MeasuredFile, bucket

CSRC_MOST_FEATURES = 2**22  # kMostStride in csrc/lora_linear.h
COMMAND = "python -m fused_lora.tune"
GUESS = f"a guess for this card: {COMMAND} measures it"
_changes = 0
Times = dict[str, float | None]  # microseconds by backend; None where one was tried and did not run


@cache
def measured(device: torch.device) -> MeasuredFile:
    """What fused_lora.tune has measured on a CUDA device; false where that is nothing."""
    return MeasuredFile(backends.cache_file("backends", device))


@cache
def any_measured() -> bool:
    """Whether fused_lora.tune has measured anything on this machine."""
    return any(measured(torch.device("cuda", index)) for index in range(torch.cuda.device_count()))


def remember(device: torch.device, key: str, times: Times) -> None:
    """For this process and later ones: each backend's time for the calls of a key_of."""
    global _changes
    measured(device).put(key, times)
    _changes += 1
    any_measured.cache_clear()
    _choose.cache_clear()


def changes() -> int:
    """How often this process has remembered something: what was chosen before may be chosen otherwise now."""
    return _changes


def key_of(M: int, N: int, K: int, r: int, dtype: torch.dtype, p: float) -> str:
    """Calls of one choice. Dropout's masks and float32's precision make other products fast."""
    return bucket("lora_linear", M, N, K, r, dtype, p > 0, backends.precision(dtype) == "tf32")


def times_of(device: torch.device, key: str) -> Times:
    """Empty for what was not measured, or makes no sense."""
    entry = measured(device).get(key)
    makes_sense = isinstance(entry, dict) and all(map(_is_time, entry.values()))
    return entry if makes_sense else {}


def _is_time(value: object) -> bool:
    return value is None or (type(value) in (int, float) and 0 < value < math.inf)


def ranked(times: Times) -> list[tuple[str, float]]:
    """Those that ran, the fastest first."""
    return sorted(((name, time) for name, time in times.items() if time is not None), key=itemgetter(1))


def in_words(times: Times) -> str:
    """cuda 1.00, addmm 1.12: over the fastest."""
    order = ranked(times)
    return ", ".join(f"{name} {time / order[0][1]:.2f}" for name, time in order)


@cache
def _choose(device: torch.device, dtype: torch.dtype, r: int, readable: bool, key: str) -> Choice:
    default, times = backends.choose_lora_linear(device, dtype, r, readable), times_of(device, key)
    if default.name not in times:  # or what can run now could not when it was measured
        return default
    obstacle = backends.lora_linear_obstacle
    runs = {name: time for name, time in times.items() if obstacle(name, device, dtype, r, readable) is None}
    order = ranked(runs)
    return Choice(order[0][0], f"measured by fused_lora.tune: {in_words(runs)}") if order else default


def choose_lora_linear(
    device: torch.device, dtype: torch.dtype, r: int, readable: bool, M: int, N: int, K: int, p: float
) -> Choice:
    """The backend of M rows through a LoRA linear, with dropout p; the rest as in backends.choose_lora_linear."""
    if device.type != "cuda" or not any_measured() or backends.forced_backend() is not None:
        return backends.choose_lora_linear(device, dtype, r, readable)
    return _choose(device, dtype, r, readable, key_of(M, N, K, r, dtype, p))


def is_guess(device: torch.device, name: str) -> bool:
    """Whether backends.py's choice of a backend rests on no measurement of such a card: all but csrc on 9.0."""
    if device.type != "cuda" or name == "reference" or backends.forced_backend() is not None:
        return False
    return name != "cuda" or backends.gpu(device).capability != 90


def explained(device: torch.device, dtype: torch.dtype, r: int, readable: bool, *sizes: int, p: float) -> Choice:
    """choose_lora_linear's for sizes M, N, K, whose reason says of a guess that it is one."""
    choice = choose_lora_linear(device, dtype, r, readable, *sizes, p)
    if choice != backends.choose_lora_linear(device, dtype, r, readable) or not is_guess(device, choice.name):
        return choice
    return Choice(choice.name, f"{choice.reason}; {GUESS}")


def _constant_when_compiled(function):
    """As torch.compiler.assume_constant_result, which would import the compiler."""
    function._dynamo_marked_constant = True
    return function


@_constant_when_compiled
@cache
def csrc_dequantises(device: torch.device) -> bool:
    """Whether its kernels for a card know weights in a format."""
    return device.type == "cuda" and backends.gpu(device).capability == 90


def csrc_reads(weight: torch.Tensor | Stored, A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether csrc's kernels can be given them: a weight of adjacent columns, factors in its dtype or in float32; or a
    weight in a format on a card whose kernels know them."""
    if A.dtype != B.dtype or max(weight.shape) > CSRC_MOST_FEATURES:
        return False
    if isinstance(weight, Stored):
        known = A.dtype in (*backends.CUDA_DTYPES, torch.float32)
        return known and weight.K > 1 and weight.codes.is_contiguous() and csrc_dequantises(weight.device)
    return weight.stride(1) == 1 and A.dtype in (weight.dtype, torch.float32)


@cache
def _together_obstacle(device, dtype, ranks: tuple[int, ...], readable: bool, forced: str | None) -> str | None:
    choices = [backends.choose_lora_linear(device, dtype, r, readable) for r in ranks]
    return next((choice.reason for choice in choices if choice.name != "cuda"), None)


@_constant_when_compiled
def together_obstacle(device: torch.device, dtype: torch.dtype, ranks: tuple[int, ...], readable: bool) -> str | None:
    """Why linears of one x are not csrc's, or None; readable as by csrc_reads."""
    return _together_obstacle(device, dtype, ranks, readable, backends.forced_backend())


@cache
def _choose_segments(device, dtype, window: int, readable: bool, drops: bool, forced: str | None) -> Choice:
    reason = _together_obstacle(device, dtype, (window,), readable, forced)
    if reason is None and not (drops and backends.gpu(device).capability != 90):
        return Choice("cuda", f"{device.type} tensor of {dtype}")
    if reason is None:
        reason = "csrc has no dropout where rows have adapters of their own for this card"
    elif forced is None:
        reason = backends.lora_linear_obstacle("cuda", device, dtype, window, readable)
    return choose_without_csrc(device, dtype, reason)


@_constant_when_compiled
def choose_without_csrc(device: torch.device, dtype: torch.dtype, reason: str) -> Choice:
    """The backend of rows with adapters of their own where csrc has no kernel, for a reason."""
    if backends.forced_backend() not in (None, "triton"):
        return Choice("reference", reason)
    for_triton = backends.triton_obstacle(device, dtype)
    if for_triton is None:
        return Choice("triton", reason)
    return Choice("reference", reason if for_triton == reason else f"{reason}; Triton: {for_triton}")


@_constant_when_compiled
def choose_segments(device: torch.device, dtype: torch.dtype, window: int, readable: bool, drops: bool) -> Choice:
    """The backend of rows with adapters of their own in windows of so many ranks, and why not one before it; readable
    as by csrc_reads, drops: whether some of the adapters drop."""
    return _choose_segments(device, dtype, window, readable, drops, backends.forced_backend())


@_constant_when_compiled
def gated_obstacle(ranks: tuple[int, ...]) -> str | None:
    """Why csrc's gated passes do not take ranks that its others do, or None."""
    return next(filter(None, map(backends.csrc().gated_obstacle, ranks)), None)


def dropout_obstacle(drop: Sequence[bool]) -> str | None:
    """Why layers whose rows have adapters of their own are not one launch, of which these drop, or None."""
    return "some of the layers drop entries of x, and others do not" if any(drop) and not all(drop) else None


@_constant_when_compiled
def gated_segments_obstacle(device: torch.device, window: int, drops: bool) -> str | None:
    """The same of rows with adapters of their own, in windows of so many ranks; drops: whether some of them drop."""
    if drops:
        return "csrc has no dropout in a gated MLP whose rows have adapters of their own"
    if backends.gpu(device).capability != 90:
        return "csrc has no gated MLP whose rows have adapters of their own for this card"
    return gated_obstacle((window,))


def way(device: torch.device, dtype: torch.dtype, M: int, K: int, N: int, r: int, p: float, backward: bool) -> str:
    """How csrc computes a pass of a linear: by "tiles"; by kernels for "few rows" (csrc/sm90/few_rows.cu); or by
    "torch", whose products take less time (csrc/torch/few_rows.h)."""
    if p:
        return "tiles"
    with torch.cuda.device(device):
        found = backends.csrc().way(M, K, N, r, backward)
    return "tiles" if found == "torch" and dtype is not torch.bfloat16 else found
