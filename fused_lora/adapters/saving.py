"""save_adapter: the LoRALinear layers of a model as an adapter that PEFT loads."""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor, nn

from .. import whole_files
from ..modules import LoRALinear
from . import banks, files
from .config import config_of
from .layers import bare, layers_of, modules_of


def save_adapter(model: nn.Module, folder: str | os.PathLike, name: str | None = None) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of a model's LoRALinear layers, or of one adapter of its
    LoRABank layers, which `name` is, into a folder:

        base_model.model.<path>.lora_A.weight (r, K), .lora_B.weight (N, r)    in the factors' own dtype
                               .lora_magnitude_vector (N,)                     of DoRA

    and the biases, where those of layers train (bias="lora_only") or a loaded config says so. load_adapter reads it,
    and so does peft.PeftModel.from_pretrained(base, folder). Ranks and alphas that differ are rank_pattern and
    alpha_pattern. What a config said that the model was made or loaded by is kept; dropout is the commonest of the
    layers'. Merged layers are written as well: their factors are what they were.

    Both files are written whole before either is in its place, so that load_adapter finds the adapter that was there or
    this one whenever the process is killed; another reader, in the moment of the two renames, may find one of each. All
    ranks of a data parallel run may call this. Other files of the folder stay.

    Warns of parameters that train and are no part of an adapter. Raises ValueError for a model without LoRALinear
    layers or with both kinds of use_rslora, ValueError or TypeError for factors that are offloaded or sharded, and
    ImportError without safetensors.
    """
    config, tensors = contents_of(model, name)
    warn_of_others(model, tensors.values(), stacklevel=3)
    whole_files.write_together(Path(folder), files.writers(config, tensors))


def contents_of(model: nn.Module, name: str | None) -> tuple[dict, dict[str, Tensor]]:
    """What save_adapter writes: the config and the tensors by their keys."""
    model = bare(model)
    if banks.has_banks(model):
        layers = banks.layers_of_adapter(model, name)
    elif name is not None:
        raise ValueError(f"name is of adapters of LoRABank layers, which the model has not, got {name!r}")
    else:
        layers = layers_of(model)
    if not layers:
        raise ValueError("model has no LoRALinear layers: replace_linear makes them, and a PeftModel saves its own")
    modules = modules_of(model)
    config = config_of(model, layers, modules.keys() - {""}, name)
    tensors = {
        files.key_of(name, which): getattr(layer, which)
        for name, layer in layers.items()
        for which in files.tensors_of(layer.use_dora)
    }
    tensors |= _biases({"none": {}, "lora_only": layers, "all": modules}[config["bias"]], layers)
    return config, tensors


def _biases(modules: dict[str, nn.Module], layers: dict[str, LoRALinear]) -> dict[str, Tensor]:
    """Those of modules, as PEFT writes them."""
    biases = {name: module._parameters.get("bias") for name, module in modules.items()}
    return {files.bias_key_of(name, name in layers): bias for name, bias in biases.items() if bias is not None}


def warn_of_others(model: nn.Module, tensors: Iterable[Tensor], stacklevel: int) -> None:
    """Of what trains and is in no adapter, where these tensors are written."""
    model = bare(model)
    written = {id(tensor) for tensor in (*tensors, *banks.factors_of_all(model))}
    others = [name for name, each in model.named_parameters() if each.requires_grad and id(each) not in written]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(
            f"an adapter does not hold {', '.join(others[:3])}{more}, which train: save them too, or freeze them",
            stacklevel=stacklevel,
        )
