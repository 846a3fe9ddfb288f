"""What explain() says of LoRABank layers, whatever adapters rows have: of a route of their largest ones."""

from collections.abc import Sequence

from . import backends, choices, segments
from .explanations import Explanation, in_short
from .modules import LoRABank
from .modules.hooks import why_alone


def explain_bank(bank: LoRABank, tokens: int) -> Explanation:
    """Other routes may say more."""
    part, adapters = bank.part(()), bank.adapters.values()
    weight, choice, r = part.weight, _choice_of(bank), max((adapter.r for adapter in adapters), default=0)
    N, K = weight.shape
    of = ((tokens, K, N, r), bank.compute_dtype, str(weight.device))
    reason = f"{len(adapters)} adapters, each row by its own"
    if choice.name == "cuda":
        launch = ("lora_linear_kernel (segments)", backends.gpu(weight.device).sm_count, {})
        return Explanation(*of, "cuda", reason, (launch,), (launch,))
    if choice.name == "reference" or not adapters:
        return Explanation(*of, "reference", f"{len(adapters)} adapters: {choice.reason}")
    launches = _record(tokens, bank) if bank.base is None else ()  # what reads codes is not recorded
    return Explanation(*of, "triton", f"{reason}; {choice.reason}", *launches)


def apart(banks: Sequence[LoRABank], gated: bool = False) -> str | None:
    """Why banks that read one x, or gated: that are an MLP, are computed one by one; or None."""
    for bank in banks:
        if (reason := why_alone(bank, LoRABank.forward)) is not None:
            return f"one of its layers runs by its own forward: {reason}"
    reason = next((choice.reason for choice in map(_choice_of, banks) if choice.name != "cuda"), None)
    drop = [bank.dropping > 0 for bank in banks]
    reason = reason or choices.dropout_obstacle(drop)
    if reason is not None or not gated:
        return reason
    return choices.gated_segments_obstacle(banks[0].weight.device, max(map(_window, banks)), any(drop))


def _record(tokens: int, bank: LoRABank) -> tuple:
    """The launches of both passes, of rows that have a bank's adapters, each in a window of its own."""
    from .kernels.lora_segments import record

    part, windows = bank.part(()), len(bank.adapters)
    gpu, precision = backends.gpu(part.weight.device), backends.precision(bank.compute_dtype)
    return tuple(map(in_short, record(tokens, part, windows, _window(bank), bank.dropping > 0, gpu, precision)))


def _window(bank: LoRABank) -> int:
    return segments.window_of(adapter.place.size for adapter in bank.adapters.values())


def _choice_of(bank: LoRABank) -> backends.Choice:
    """The backend of rows that have any of its adapters."""
    part = bank.part(())
    weight, readable = part.weight, choices.csrc_reads(part.weight, part.A, part.B)
    return choices.choose_segments(weight.device, bank.compute_dtype, _window(bank), readable, bank.dropping > 0)
