"""Modules that hold parameters."""

from .lora_linear import LoRALinear
from .lora_mlp import LoRAMLP
from .replace import replace_linear
from .report import ReplaceReport, print_trainable_parameters
from .unload import merge_and_unload

__all__ = [
    "LoRALinear", "LoRAMLP", "ReplaceReport", "merge_and_unload", "print_trainable_parameters", "replace_linear",
]  # fmt: skip
