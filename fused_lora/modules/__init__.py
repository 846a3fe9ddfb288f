"""Modules that hold parameters."""

from .lora_group import LoRAGroup
from .lora_linear import LoRALinear
from .lora_mlp import LoRAMLP
from .replace import replace_linear
from .report import ReplaceReport

__all__ = ["LoRAGroup", "LoRALinear", "LoRAMLP", "ReplaceReport", "replace_linear"]
