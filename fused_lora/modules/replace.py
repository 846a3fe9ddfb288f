"""replace_linear: nn.Linear swapped for LoRALinear inside a model, in place, with a report."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from .. import checks
from ..formats import Format
from .config import LoRAConfig, asked_for, fields_of, remember
from .exchanging import exchange
from .freezing import freeze_all_but_updates
from .frozen import asked_base, names_of_bases, naming
from .fusing import fuse as fuse_layers
from .lora_linear import LoRALinear
from .report import ReplaceReport
from .targets import find_linears

FUSE = ("auto", "off")


def replace_linear(
    model: nn.Module,
    r: int | None = None,
    lora_alpha: float | None = None,
    target_modules: str | Iterable[str] | None = None,
    exclude_modules: str | Iterable[str] | None = None,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    lora_dtype: torch.dtype | None = None,
    train_bias: bool = False,
    fuse: str = "auto",
    pad_rows: bool | None = None,
    freeze: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    use_dora: bool = False,
    config=None,
    base: str | Format | None = None,
) -> ReplaceReport:
    """Swaps nn.Linear modules of `model` for LoRALinear, in place, and returns what was replaced and skipped and why.

    target_modules and exclude_modules are a regular expression for the whole module name, or a list of names or of
    their last parts ("q_proj", "mlp.down_proj"); None targets every nn.Linear but heads (output embeddings and
    classifiers, which are adapted where they are named), "all-linear" what PEFT means by it: every one but the output
    embedding of one of Hugging Face's models. What is replaced keeps its own weight and bias tensors, now frozen (the
    bias unless train_bias); everything else is left exactly as it was, and goes on training if it did. freeze=True
    stops all but the updates from requiring gradients: unfreeze after it what shall train too.

    rank_pattern and alpha_pattern give r and lora_alpha of layers by a regular expression for their name or the last
    parts of it, as PEFT has them: {"down_proj": 4, "^model.layers.0.mlp.up_proj": 2}. lora_alpha left out is 1.0, with
    a warning: scale is then 1 / r, where PEFT's lora_alpha is 8.

    use_dora gives each row a length of its own, as LoRALinear says.

    base keeps the frozen weights in fewer bits: "fp8", "int8", "nf4", "nf4-nested", or a format of fused_lora.formats.
    They are quantised one by one, so that two copies of the model never are in memory, and the linears that were
    replaced have none any more. Factors have the weights' dtype unless lora_dtype says otherwise.

    config says all that in the place of these arguments: a LoraConfig of PEFT, a folder with an adapter_config.json, or
    such a dict, taken as PEFT takes it (bias="all" lets every bias of the model require gradients). What else it holds
    is kept for save_adapter. save_pretrained of a Hugging Face model writes layers that its from_pretrained does not
    know: save_adapter, or merge_and_unload first.

    A linear is left alone, with the reason in the report, where it shares memory, has hooks, a forward or a weight that
    a replacement would lose, or where a module above it reads its weight instead of calling it, so that the update
    would be left out. A function outside the model that reads a weight, as some losses do, cannot be seen.

    With fuse="auto", layers that a module calls with one x, as its source says, are computed together (LoRASiblings: q,
    k and v, or k and v), and a module whose forward is down(act(gate(x)) up(x)) of three replaced layers becomes a
    LoRAMLP, which computes them as one; with "off" each stays alone. Those modules get a subclass of their own class.

    On a GPU, 16-bit weights with in_features that are no multiple of 8 move to rows that start at multiples of 128
    bytes, as views of the same shape, which safetensors wants .contiguous(). pad_rows=False leaves them dense, as FSDP
    needs them, and each pass on Hopper copies them; the default pads them where torch.distributed is not initialized.

    Warns of entries of target_modules, exclude_modules and the patterns that name no layer. Raises ValueError when it
    would replace nothing, for a model that has adapters of PEFT, for a config with fields that are not served or beside
    arguments, or for a bad r, lora_alpha or lora_dropout, before any change.
    """
    asked = {
        "r": r, "lora_alpha": lora_alpha, "target_modules": target_modules, "exclude_modules": exclude_modules,
        "lora_dropout": lora_dropout, "use_rslora": use_rslora, "use_dora": use_dora, "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern, "bias": "lora_only" if train_bias else "none",
    }  # fmt: skip
    if config is None:
        checks.check_rank(r)
        if lora_alpha is None:
            asked["lora_alpha"] = 1.0
            warnings.warn("lora_alpha was left out, and is 1.0: scale is 1 / r (PEFT's default is 8)", stacklevel=2)
        return convert(model, LoRAConfig(**asked), lora_dtype, fuse, pad_rows, freeze, base)
    unset = {"lora_dropout": 0.0, "use_rslora": False, "use_dora": False, "bias": "none"}
    beside = [name for name, value in asked.items() if value != unset.get(name)]
    if beside:
        names = ", ".join("train_bias" if name == "bias" else name for name in beside)
        raise ValueError(f"give config or {names}, not both")
    given = fields_of(config)
    report = convert(model, asked_for(given), lora_dtype, fuse, pad_rows, freeze, base)
    remember(model, given)
    return report


def convert(
    model: nn.Module,
    config: LoRAConfig,
    lora_dtype: torch.dtype | None = None,
    fuse: str = "auto",
    pad_rows: bool | None = None,
    freeze: bool = False,
    base: str | Format | None = None,
) -> ReplaceReport:
    """replace_linear by what a config asks for."""
    checks.check_rank(config.r)
    checks.check_scale("lora_alpha", config.lora_alpha)
    checks.check_probability("lora_dropout", config.lora_dropout)
    if fuse not in FUSE:
        raise ValueError(f"fuse must be one of {', '.join(FUSE)}, got {fuse!r}")
    base = asked_base(base)
    report, targets = find_linears(model, config.selection)
    # Everything that can fail comes before the first change.
    layers = [
        naming(
            name, LoRALinear.beside, linear, *config.of(name), config.lora_dropout, config.use_rslora, lora_dtype,
            pad_rows, config.use_dora, base,
        )
        for name, linear in zip(report.replaced, targets, strict=True)
    ]  # fmt: skip
    unmatched = config.unmatched(report.replaced)
    for entry in unmatched:
        warnings.warn(f"{entry} matches no layer that is replaced", stacklevel=3)
    report.unmatched += unmatched
    exchange(model, {id(linear): layer for linear, layer in zip(targets, layers, strict=True)})
    for linear, layer in zip(targets, layers, strict=True):
        layer.quantise(linear, base)
        layer.take_base(train_bias=config.bias != "none")
    if freeze:
        freeze_all_but_updates(model)
    if config.bias == "all":
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] == "bias":
                parameter.requires_grad_(True)
    report.base = names_of_bases(layers)
    report.count(model)
    if fuse == "auto":
        report.groups, report.mlps = fuse_layers(model, report.layers(model))
    return report
