"""replace_linear: nn.Linear swapped for LoRALinear inside a model, in place, with a report."""

from collections.abc import Iterable

import torch
from torch import nn

from .. import checks
from .fusing import fuse as fuse_layers
from .lora_linear import LoRALinear
from .report import ReplaceReport
from .targets import find_linears

FUSE = ("auto", "off")


def replace_linear(
    model: nn.Module,
    r: int,
    lora_alpha: float = 1.0,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    lora_dtype: torch.dtype | None = None,
    train_bias: bool = False,
    fuse: str = "auto",
    pad_rows: bool | None = None,
    freeze: bool = False,
) -> ReplaceReport:
    """Swaps nn.Linear modules of `model` for LoRALinear, in place, and returns what was replaced and skipped and why.

    target_modules and exclude_modules are a regular expression for the whole module name, or a list of names or of
    their last parts ("q_proj", "mlp.down_proj"); None targets every nn.Linear but heads (output embeddings and
    classifiers, which are adapted where they are named). What is replaced keeps its own weight and bias tensors, now
    frozen (the bias unless train_bias); everything else is left exactly as it was, and goes on training if it did.
    freeze=True stops all but the updates from requiring gradients: unfreeze after it what shall train too.

    A linear is left alone, with the reason in the report, where it shares memory, has hooks, a forward or a weight that
    a replacement would lose, or where a module above it reads its weight instead of calling it, so that the update
    would be left out. A function outside the model that reads a weight, as some losses do, cannot be seen.

    With fuse="auto", layers that a module calls with one x, as its source says, are computed together (LoRASiblings: q,
    k and v, or k and v), and a module whose forward is down(act(gate(x)) up(x)) of three replaced layers becomes a
    LoRAMLP, which computes them as one; with "off" each stays alone. Those modules get a subclass of their own class.

    On a GPU, 16-bit weights with in_features that are no multiple of 8 move to rows that start at multiples of 128
    bytes, as views of the same shape, which safetensors wants .contiguous(). pad_rows=False leaves them dense, as FSDP
    needs them, and each pass on Hopper copies them; the default pads them where torch.distributed is not initialized.

    Warns of entries of target_modules and exclude_modules that name no layer. Raises ValueError when it would replace
    nothing, for a model that has adapters of PEFT, or for a bad r, lora_alpha or lora_dropout, before any change.
    """
    checks.check_rank(r)
    checks.check_scale("lora_alpha", lora_alpha)
    checks.check_probability("lora_dropout", lora_dropout)
    if fuse not in FUSE:
        raise ValueError(f"fuse must be one of {', '.join(FUSE)}, got {fuse!r}")
    report, targets = find_linears(model, target_modules, exclude_modules)
    # Everything that can fail comes before the first change.
    layers = {
        id(linear): LoRALinear.beside(linear, r, lora_alpha, lora_dropout, use_rslora, lora_dtype, pad_rows)
        for linear in targets
    }
    for parent in list(model.modules()):
        for child_name, child in parent._modules.items():  # named_children would skip a module's second name
            if id(child) in layers:
                parent._modules[child_name] = layers[id(child)]
    for layer in layers.values():
        layer.take_base(train_bias)
    if freeze:
        _freeze_all_but_updates(model)
    report.count(model)
    if fuse == "auto":
        report.groups, report.mlps = fuse_layers(model, report.layers(model))
    return report


def _freeze_all_but_updates(model: nn.Module) -> None:
    """LoRALinear layers, those of an earlier call too, have frozen what is not to train of their own."""
    for module in model.modules():
        if not isinstance(module, LoRALinear):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(False)
