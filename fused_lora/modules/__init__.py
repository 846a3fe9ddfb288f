"""Modules that hold parameters."""

from .lora_group import LoRAGroup
from .lora_linear import LoRALinear
from .replace import ReplaceReport, replace_linear

__all__ = ["LoRAGroup", "LoRALinear", "ReplaceReport", "replace_linear"]
