"""LoRAConfig: what a layer is to be, by replace_linear's arguments or by a config of PEFT, which is read here."""

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path

from torch import nn

from .. import checks, whole_files
from .selection import ALL_LINEAR, Selection

CONFIG = "adapter_config.json"
BIASES = ("none", "all", "lora_only")
# What these ask for changes the mathematics, or adapts more than linears: nothing here computes it.
UNSERVED = (
    "lora_bias", "modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip
# Beginnings that change the base's weights too, or freeze a factor.
UNSERVED_BEGINNINGS = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


@dataclass
class LoRAConfig:
    """The fields of PEFT's LoraConfig that replace_linear serves, with its defaults and its meaning.

    rank_pattern and alpha_pattern give r and lora_alpha of layers by regular expressions for their names or the last
    parts of them; the first that matches counts. The scale is lora_alpha / r, or / sqrt(r) with use_rslora.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    task_type: str | None = None

    def __post_init__(self):
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        checks.check_rank(self.r)
        if self.bias not in BIASES:
            raise ValueError(f"bias must be one of {', '.join(BIASES)}, got {self.bias!r}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform needs a list as target_modules, got a string")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern needs layers_to_transform beside it")

    @property
    def selection(self) -> Selection:
        """Which layers."""
        return Selection(
            self.target_modules, self.exclude_modules, self.layers_to_transform, self.layers_pattern, self.task_type
        )

    def of(self, name: str) -> tuple[int, float]:
        """(r, lora_alpha) of the layer with a name."""
        return _patterned(self.rank_pattern, name, self.r), _patterned(self.alpha_pattern, name, self.lora_alpha)

    def unmatched(self, names: list[str]) -> list[str]:
        """The patterns that none of the layers is given by."""
        return [
            f"{argument} entry {key!r}"
            for argument, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
            for key in pattern
            if not any(is_given_by(name, key) for name in names)
        ]


def _patterned(pattern: dict, name: str, default):
    return next((value for key, value in pattern.items() if is_given_by(name, key)), default)


def is_given_by(name: str, key: str) -> bool:
    """Whether a key of a pattern is about the layer with a name."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def fields_of(config) -> dict:
    """All fields of a LoraConfig, of a folder with adapter_config.json, or of a dict, as JSON has them.

    Raises ValueError for a folder without such a file or one that is damaged, TypeError for anything else.
    """
    if isinstance(config, (str, os.PathLike)):
        config = _read(Path(config))
    elif isinstance(config, Mapping):
        _check_spelling(config)
    else:
        if not callable(getattr(config, "to_dict", None)):
            raise TypeError(f"config must be a LoraConfig, a folder or a dict, got {type(config).__name__}")
        config = config.to_dict()
    return {key: _plain(value) for key, value in config.items()}


def _check_spelling(config: Mapping) -> None:
    """A dict is written by hand. Fields that only PEFT knows pass, but not what is nearly one of these."""
    known = [each.name for each in fields(LoRAConfig)]
    for name in config:
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
        if name not in known and name not in UNSERVED and close:
            raise ValueError(f"config has the field {name!r}: {close[0]!r} is meant?")


def _plain(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return value.value if isinstance(value, Enum) else value


def _read(folder: Path) -> dict:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder with an adapter")
    with whole_files.files_of(folder) as place:
        return parse(place(CONFIG))


def parse(path: Path) -> dict:
    """An adapter_config.json; ValueError where there is none."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path.parent} is no adapter: it has no {CONFIG}") from None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} is damaged: it holds no table of fields")
    return config


def served(given: dict, beginnings: bool = False) -> LoRAConfig:
    """What is asked for by all fields of a config. Raises ValueError with every field that nothing here computes;
    beginnings: also where factors are to begin in another way than these do."""
    refused = [f"{name}={given[name]!r}" for name in UNSERVED if given.get(name)]
    if str(given.get("peft_type") or "LORA").upper() != "LORA":
        refused.append(f"peft_type={given['peft_type']!r}")
    begins = given.get("init_lora_weights", True)
    if str(begins).lower().startswith(UNSERVED_BEGINNINGS) or (beginnings and begins is not True):
        refused.append(f"init_lora_weights={begins!r}")
    if refused:
        raise ValueError(f"config asks for what is not served: {', '.join(refused)}")
    return LoRAConfig(**{each.name: given[each.name] for each in fields(LoRAConfig) if each.name in given})


def asked_for(given: dict) -> LoRAConfig:
    """What replace_linear is to do by a config; ValueError also where PEFT would look up the layers in a table."""
    asked = served(given, beginnings=True)
    if asked.target_modules is None:
        raise ValueError(f"config.target_modules must name layers or be {ALL_LINEAR!r}, got None")
    return asked


def remember(model: nn.Module, given: dict, name: str | None = None) -> None:
    """Keeps all fields of a config with a model, for when its adapter is saved: also those that mean nothing here. Of
    models with banks by the adapter's name."""
    model._lora_configs = getattr(model, "_lora_configs", {}) | {name: given}


def remembered(model: nn.Module, name: str | None = None) -> dict:
    """What remember kept, or nothing."""
    return getattr(model, "_lora_configs", {}).get(name, {})


def forget(model: nn.Module, name: str | None = None) -> None:
    """Undoes remember."""
    getattr(model, "_lora_configs", {}).pop(name, None)
