"""config_of: the adapter_config.json of layers as they are."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn

from ..modules import LoRALinear
from ..modules.config import remembered, served
from ..modules.selection import Selection

DEFAULTS = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "bias": "none", "fan_in_fan_out": False,
    "init_lora_weights": True, "modules_to_save": None, "exclude_modules": None,
    "layers_to_transform": None, "layers_pattern": None, "use_dora": False,
}  # fmt: skip


def config_of(
    model: nn.Module, layers: dict[str, LoRALinear], names: Iterable[str], adapter: str | None = None
) -> dict:
    """The fields by which PEFT makes these layers, by name, with their ranks and scales, of a model with modules of
    such names; and whatever else a config said that the model was made or loaded by.

    Fields that say it already stay as they are. Raises ValueError where one config cannot say it."""
    given = DEFAULTS | remembered(model, adapter)
    if given["base_model_name_or_path"] is None:
        given["base_model_name_or_path"] = getattr(model, "name_or_path", None) or None
    if given["task_type"] is None and not given.get("auto_mapping"):
        given["auto_mapping"] = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    if given["bias"] == "none" and any(
        layer.bias is not None and layer.bias.requires_grad for layer in layers.values()
    ):
        given["bias"] = "lora_only"
    given["inference_mode"] = True  # as PEFT writes it: who loads it says whether it trains
    given["lora_dropout"] = _commonest(layer.lora_dropout for layer in layers.values())
    return given | _scales(given, layers) | _targets(given, layers, names)


def _scales(given: dict, layers: dict[str, LoRALinear]) -> dict:
    """The fields that give each layer its rank and its scale."""
    fields = {}
    for name in ("use_rslora", "use_dora"):
        found = {getattr(layer, name) for layer in layers.values()}
        if len(found) > 1:
            raise ValueError(f"{name} must be the same for all layers of an adapter, got both")
        fields[name] = found.pop()
    asked = served(given)
    if all(asked.of(name) == (layer.r, layer.lora_alpha) for name, layer in layers.items()):
        return fields | {"r": asked.r, "lora_alpha": asked.lora_alpha}
    r = _commonest(layer.r for layer in layers.values())
    lora_alpha = _commonest(layer.lora_alpha for layer in layers.values())
    return fields | {
        "r": r,
        "lora_alpha": lora_alpha,
        "rank_pattern": {_exactly(name): layer.r for name, layer in layers.items() if layer.r != r},
        "alpha_pattern": {
            _exactly(name): layer.lora_alpha for name, layer in layers.items() if layer.lora_alpha != lora_alpha
        },
    }


def _targets(given: dict, layers: dict[str, LoRALinear], names: Iterable[str]) -> dict:
    """The fields that choose the layers among all modules: the shortest list that does, or else an expression."""
    selection, names = served(given).selection, set(names)
    if selection.by_name and _chosen(selection, names) == layers.keys():
        return {}
    last_parts = sorted({name.rpartition(".")[2] for name in layers})
    lists = (each for each in (last_parts, sorted(layers)) if _chosen(Selection(each), names) == layers.keys())
    return {
        "target_modules": next(lists, "|".join(map(re.escape, layers))),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _chosen(selection: Selection, names: set[str]) -> set[str]:
    return {name for name in names if selection.reason([name]) is None}


def _exactly(name: str) -> str:
    """A pattern for this name alone."""
    return "^" + re.escape(name)


def _commonest(values: Iterable):
    return Counter(values).most_common(1)[0][0]
