"""explain(): which backend, kernels and tiles a layer or a shape gets, and why, found by running the launchers dry."""

from dataclasses import replace

import torch
from torch import nn

from . import backends, checks, choices
from .cards import CARDS
from .explain_banks import apart, explain_bank
from .explanations import Explanation, MLPExplanation, ModelExplanation, in_short
from .modules import LoRAMLP
from .modules.frozen import Frozen
from .modules.protocol import LoRALayer, is_bank, is_lora, together
from .modules.siblings import LoRASiblings
from .ops.lora_parts import measured_obstacle
from .predict import Prediction, predict_triton


def _record(x, weight, A, B, bias, p: float, gpu):
    """The launches of forward and backward on tensors of the `meta` device."""
    from .kernels.dropout import Dropout
    from .kernels.launch import record_launches
    from .kernels.lora_linear import lora_linear_backward, lora_linear_forward

    scale = torch.empty((), device="meta")
    dropout = Dropout(p, torch.empty((), dtype=torch.int64, device="meta") if p else None)
    precision = backends.precision(x.dtype)
    with record_launches() as forward:
        y, xa = lora_linear_forward(x, weight, A, B, bias, scale, dropout, gpu, precision)
    with record_launches() as backward:
        lora_linear_backward(
            torch.empty_like(y), x, weight, A, B, xa, scale, dropout, gpu, precision, (True, True, True)
        )
    return in_short(forward), in_short(backward)


def _notes(M: int, K: int, N: int, r: int, dtype: torch.dtype, factor_dtype: torch.dtype, gpu) -> tuple[str, ...]:
    notes = []
    if gpu.has_tma and dtype.itemsize == 2:
        for name, size in (("in_features", K), ("out_features", N)):
            if size % 8:
                notes.append(f"{name}={size} is not a multiple of 8: rows are not 16-byte aligned, so no TMA; slow")
        if r % 8:
            notes.append(f"r={r} is not a multiple of 8: xa and dxa are read by pointer, in two loops")
    if dtype is torch.float32 and backends.precision(dtype) == "ieee":
        notes.append(
            'float32 multiplies in IEEE, off the tensor cores; torch.set_float32_matmul_precision("high") is TF32'
        )
    if factor_dtype != dtype:
        notes.append(_copied_factors(dtype, factor_dtype))
    return tuple(notes)


def _explain_csrc(shape, dtype: torch.dtype, factor_dtype: torch.dtype, device, reason: str, p: float) -> Explanation:
    M, K, N, r = shape
    ways = [choices.way(device, dtype, M, K, N, r, p, backward) for backward in (False, True)]
    launches = [
        _csrc_launches(device, way, name, columns, M, r)
        for way, name, columns in zip(ways, ("forward", "backward"), (N, K), strict=True)
    ]
    notes = ["x, dy or a weight whose rows do not start at multiples of 16 bytes is copied first"]
    for name, size, copied in (
        ("in_features", K, "x is, and the weight unless its rows are padded,"),
        ("out_features", N, "dy is"),
    ):
        if size % 8:
            notes.append(f"{name}={size} is not a multiple of 8: {copied} copied to padded rows")
    torchs = [name for name, way in zip(("forward", "backward"), ways, strict=True) if way == "torch"]
    if torchs:
        which = " and ".join(torchs)
        notes.insert(0, f"{which} by torch's products: few rows leave most of these kernels' blocks without work")
    if factor_dtype != dtype:
        notes.append(_copied_factors(dtype, factor_dtype))
    elif r % 8:
        notes.append(f"r={r} is not a multiple of 8: B is copied to padded rows in each pass, N r elements")
    return Explanation(shape, dtype, str(device), "cuda", reason, *launches, tuple(notes))


def _csrc_launches(device, way: str, name: str, columns: int, M: int, r: int) -> tuple:
    sms = backends.gpu(device).sm_count
    if way == "few rows":
        return tuple((f"{kernel}_few_rows_kernel", sms, {}) for kernel in ("shrink", "expand"))
    return ((f"lora_linear_kernel ({name})", sms, backends.csrc_tile(device, M, columns, r)),)


def _copied_factors(dtype: torch.dtype, factor_dtype: torch.dtype) -> str:
    return f"A and B are {factor_dtype}: copied to {dtype} in each pass, r (K + N) elements"


def _group_notes(module: LoRASiblings, tokens: int, gpu: str | None) -> dict[nn.Module, str]:
    """For each layer that the module may call with others, what becomes of that."""
    notes = {}
    for names in reversed(module._reading.every):  # the largest groups last
        layers = [module.get_submodule(name) for name in names]
        how = f"one by one: explained for {gpu}" if gpu else _how(layers, tokens)
        notes |= dict.fromkeys(layers, f"one of {len(layers)} layers that are called with one x, computed {how}")
    return notes


def _like(layer: nn.Module) -> torch.Tensor:
    """Of the dtype and the place of what a layer reads: a plain tensor, whatever its weight is."""
    if not is_lora(layer):
        return torch.empty(0)
    return torch.empty(0, dtype=layer.compute_dtype, device=layer.frozen_weight.device)


def _how(layers: list[LoRALayer], tokens: int) -> str:
    if all(map(is_bank, layers)):  # whatever adapters rows have now
        reason = apart(layers)
        return "in one launch" if reason is None else f"one by one: {reason}"
    if any(map(is_bank, layers)):
        return "one by one: only some of them are LoRABank layers"
    found = together(layers, _like(layers[0]))
    reason = found if isinstance(found, str) else _measured_apart(layers, tokens)
    return "in one launch" if reason is None else f"one by one: {reason}"


def _measured_apart(layers: list[LoRALayer], tokens: int) -> str | None:
    """Why fused_lora.tune's measurements keep layers that csrc can compute as one from it, or None."""
    rows = _like(layers[0]).new_empty(tokens, 0)
    return measured_obstacle(rows, [layer.lora_part() for layer in layers], layers[0].dropping)


def _explain_mlp(mlp: LoRAMLP, tokens: int, gpu: str | None) -> MLPExplanation:
    structure = mlp._structure
    three = structure.layers(mlp)
    layers = dict(zip((structure.gate, structure.up, structure.down), three, strict=True))
    if gpu:
        reason = f"explained for {gpu}"
    elif all(map(is_bank, three)):
        reason = mlp.change() or apart(three, gated=True)
    else:
        reason = mlp.why_not(_like(three[0])) or _measured_apart(three, tokens)
    fused = "act(gate) up is made, and differentiated, in the launches of the products beside it"
    return MLPExplanation(
        {name: explain(layer, tokens=tokens, gpu=gpu) for name, layer in layers.items() if _is_ours(layer)},
        fused if reason is None else f"no: {reason}",
    )


def _explain_model(model: nn.Module, **options) -> ModelExplanation:
    layers: dict[str, Explanation | MLPExplanation] = {}
    of_mlps: set[nn.Module] = set()
    notes: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, LoRAMLP):
            of_mlps.update(module.modules())
        elif isinstance(module, LoRASiblings):
            notes |= _group_notes(module, **options)
        if isinstance(module, LoRAMLP) or (_is_ours(module) and module not in of_mlps):
            layers[name] = _with_note(explain(module, **options), notes.get(module))
    if not layers:
        raise ValueError(f"layer must be or hold a LoRALinear, got {type(model).__name__} without one: replace_linear")
    return ModelExplanation(layers)


def _is_ours(module: nn.Module) -> bool:
    return is_lora(module) or is_bank(module)


def _with_note(explanation: Explanation | MLPExplanation, note: str | None) -> Explanation | MLPExplanation:
    return explanation if note is None else replace(explanation, notes=(*explanation.notes, note))


def explain(
    layer: nn.Module | None = None,
    *,
    tokens: int = 8192,
    in_features: int | None = None,
    out_features: int | None = None,
    r: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    lora_dtype: torch.dtype | None = None,
    p: float = 0.0,
    device: torch.device | str | None = None,
    gpu: str | None = None,
) -> Explanation | MLPExplanation | ModelExplanation:
    """Which backend, kernels and tiles `tokens` rows through a layer get, and why; print() the result.

    Either a LoRALinear, a LoRAMLP or a model that holds some, or in_features, out_features and r (with dtype,
    lora_dtype and dropout p). gpu names a card to explain for, with predicted times ("A100" and others: cards.py);
    without it, `device`, which is by default the layer's, or this machine's GPU.
    """
    if isinstance(layer, LoRAMLP):
        return _explain_mlp(layer, tokens, gpu)
    if is_bank(layer):
        return _with_base(explain_bank(layer, tokens), layer)
    if layer is not None and not is_lora(layer):
        return _explain_model(layer, tokens=tokens, gpu=gpu)
    found = _explain_layer(layer, tokens, in_features, out_features, r, dtype, lora_dtype, p, device, gpu)
    return _with_base(_with_note(found, _by_name(layer)), layer)


def _with_base(explanation: Explanation, layer: nn.Module | None) -> Explanation:
    in_format = isinstance(layer, Frozen) and layer.base is not None
    return replace(explanation, base=layer.base.name) if in_format else explanation


def _by_name(layer: LoRALayer | None) -> str | None:
    """What is said of a layer of PEFT's whose samples may name their adapters."""
    ask = getattr(type(layer), "why_not_by_name", None)
    reason = None if ask is None or layer.why_not() else ask(layer)
    return None if reason is None else f"where samples name their adapters, its own forward computes it: {reason}"


def _explain_own(layer: LoRALayer, tokens: int, reason: str) -> Explanation:
    """Of a layer that no pass of this package computes."""
    weight = layer.frozen_weight
    N, K = weight.shape
    return Explanation((tokens, K, N, 0), layer.compute_dtype, str(weight.device), "its own forward", reason)


def _explain_layer(layer, tokens, in_features, out_features, r, dtype, lora_dtype, p, device, gpu) -> Explanation:
    readable, in_full = True, True
    if layer is not None:
        reason = layer.why_not()
        if reason is not None:
            return _explain_own(layer, tokens, reason)
        part, p = layer.lora_part(), layer.dropping
        (out_features, in_features), r = part.weight.shape, part.r
        dtype, lora_dtype, device = layer.compute_dtype, part.A.dtype, part.weight.device
        readable, in_full = choices.csrc_reads(part.weight, part.A, part.B), isinstance(part.weight, torch.Tensor)
    elif device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    if in_features is None or out_features is None or r is None:
        raise ValueError("explain needs a layer, or in_features, out_features and r")
    checks.check_rank(r)
    for name, size in (("tokens", tokens), ("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    shape = (tokens, in_features, out_features, r)
    factor_dtype = lora_dtype or dtype
    if gpu is None:
        choice = choices.explained(device, dtype, r, readable, tokens, out_features, in_features, p=p)
        if choice.name == "cuda":
            return _explain_csrc(shape, dtype, factor_dtype, device, choice.reason, p)
        if choice.name in ("addmm", "reference"):
            return Explanation(shape, dtype, str(device), choice.name, choice.reason)
        target, reason = backends.gpu(device), choice.reason
    else:
        if not backends.has_triton():
            raise ModuleNotFoundError("explaining for a GPU needs triton installed")
        if gpu not in CARDS:
            raise ValueError(f"gpu must be one of {', '.join(CARDS)}, got {gpu!r}")
        if dtype not in backends.TRITON_DTYPES:
            return Explanation(shape, dtype, gpu, "reference", f"no kernel for {dtype}")
        target, reason, device = _known_gpu(gpu), f"explained for {gpu}", gpu
        if dtype in backends.CUDA_DTYPES:
            reason += " without the CUDA extension"
    if not in_full:  # what reads codes is not recorded
        return Explanation(shape, dtype, str(device), "triton", reason, gpu=gpu)
    x = torch.empty(tokens, in_features, dtype=dtype, device="meta")
    weight = torch.empty(out_features, in_features, dtype=dtype, device="meta")
    A = torch.empty(r, in_features, dtype=factor_dtype, device="meta")
    B = torch.empty(out_features, r, dtype=factor_dtype, device="meta")
    forward, backward = _record(x, weight, A, B, None, p, target)
    notes = _notes(*shape, dtype, factor_dtype, target)
    predicted = None if gpu is None or p or dtype.itemsize != 2 else _predict(shape, gpu, forward, backward)
    return Explanation(shape, dtype, str(device), "triton", reason, forward, backward, notes, gpu, predicted)


def _known_gpu(name: str):
    from .kernels.tiles import KNOWN_GPUS

    return KNOWN_GPUS[name]


def _predict(shape: tuple[int, int, int, int], gpu: str, *passes) -> Prediction:
    """Of recorded launches."""
    return predict_triton(*shape, CARDS[gpu], *(tuple(name for name, _, _ in launches) for launches in passes))
