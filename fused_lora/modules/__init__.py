"""Modules that hold parameters."""

from .lora_linear import LoRALinear
from .lora_mlp import LoRAMLP
from .replace import replace_linear
from .report import ReplaceReport

__all__ = ["LoRALinear", "LoRAMLP", "ReplaceReport", "replace_linear"]
