"""Modules that hold parameters."""

from .lora_linear import LoRALinear
from .replace import ReplaceReport, replace_linear

__all__ = ["LoRALinear", "ReplaceReport", "replace_linear"]
