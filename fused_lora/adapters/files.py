"""A folder with adapter_config.json and adapter_model.safetensors, read and written; and the names of the tensors."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import whole_files
from ..modules.config import CONFIG, parse

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTORS, MAGNITUDES = ("lora_A", "lora_B"), "lora_magnitude_vector"


def key_of(name: str, which: str) -> str:
    """Of a factor or the magnitudes, of the layer with a name."""
    return f"{PREFIX}{name}.{which}" + ("" if which == MAGNITUDES else ".weight")


def tensors_of(use_dora: bool) -> tuple[str, ...]:
    """Those that a layer has in a file, as it calls them too."""
    return (*FACTORS, MAGNITUDES) if use_dora else FACTORS


def bias_key_of(name: str, is_adapted: bool) -> str:
    """Of the bias of a module, the model itself too. PEFT has the linears that it adapts inside layers of its own."""
    return PREFIX + ".".join(part for part in (name, "base_layer" if is_adapted else "", "bias") if part)


def writers(config: dict, tensors: dict[str, Tensor]) -> dict[str, Callable[[Path], object]]:
    """Both files by their names, for whole_files."""
    library = _safetensors()
    # Not sort_keys: of the entries of a pattern the first that matches counts.
    text = json.dumps(dict(sorted(config.items())), indent=2)
    return {
        WEIGHTS: lambda path: library.save_file(_dense(tensors), path, metadata={"format": "pt"}),
        CONFIG: lambda path: path.write_text(text),
    }


def _dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clones share no memory, which safetensors would refuse."""
    return {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def is_there(folder: Path) -> bool:
    """Whether a folder has an adapter."""
    if not whole_files.exists(folder):
        return False
    with whole_files.files_of(folder) as place:
        return place(CONFIG).exists()


def read(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """(all fields of the config, the tensors by keys with PREFIX); ValueError for a folder without both, or damaged."""
    library = _safetensors()
    if not whole_files.exists(folder):
        raise ValueError(f"{folder} is no folder with an adapter")
    with whole_files.files_of(folder) as place:
        config, weights = parse(place(CONFIG)), place(WEIGHTS)
        if not weights.exists():
            raise ValueError(f"{folder} has no {WEIGHTS}, which alone is read here")
        try:
            tensors = library.load_file(weights)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(f"{weights} is damaged: {error}") from None
    # Where PEFT's layers were put into a model without its PeftModel, names begin with the model's own.
    is_prefixed = all(key.startswith(PREFIX) for key in tensors)
    return config, tensors if is_prefixed else {PREFIX + key: tensor for key, tensor in tensors.items()}


def _safetensors():
    """The library, which nothing else here needs."""
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}: adapters' files need it, pip install 'fused_lora[adapters]'") from None
    return safetensors.torch
