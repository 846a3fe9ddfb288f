"""Modules that hold parameters."""

from .banks import adapter_parameters, add_adapter, delete_adapter, rename_adapter
from .lora_bank import LoRABank
from .lora_linear import LoRALinear
from .lora_mlp import LoRAMLP
from .replace import replace_linear
from .report import ReplaceReport, print_trainable_parameters
from .routing import route, set_adapter
from .unload import merge_and_unload

__all__ = [
    "LoRABank", "LoRALinear", "LoRAMLP", "ReplaceReport", "adapter_parameters", "add_adapter", "delete_adapter",
    "merge_and_unload", "print_trainable_parameters", "rename_adapter", "replace_linear", "route",
    "set_adapter",
]  # fmt: skip
