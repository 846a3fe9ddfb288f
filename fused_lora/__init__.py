"""Fused low-rank matmuls for PyTorch: LoRA linears whose base, update and gradients share their kernels."""

from .adapters import load_adapter, save_adapter
from .explain import explain
from .modules import LoRALinear, ReplaceReport, merge_and_unload, print_trainable_parameters, replace_linear
from .ops import lora_linear, merge_

__version__ = "0.1.0"
__all__ = [
    "LoRALinear", "ReplaceReport", "explain", "load_adapter", "lora_linear", "merge_", "merge_and_unload",
    "print_trainable_parameters", "replace_linear", "save_adapter",
]  # fmt: skip
