"""Fused low-rank matmuls for PyTorch: LoRA linears whose base, update and gradients share their kernels."""

from .adapters import AdapterCache, AdapterTree, CachedTree, load_adapter, save_adapter
from .explain import explain
from .modules import (
    LoRABank,
    LoRALinear,
    ReplaceReport,
    adapter_parameters,
    add_adapter,
    delete_adapter,
    merge_and_unload,
    print_trainable_parameters,
    rename_adapter,
    replace_linear,
    route,
    set_adapter,
)
from .ops import lora_linear, merge_

__version__ = "0.1.0"
__all__ = [
    "AdapterCache", "AdapterTree", "CachedTree", "LoRABank", "LoRALinear", "ReplaceReport", "adapter_parameters",
    "add_adapter", "delete_adapter", "explain", "load_adapter", "lora_linear", "merge_", "merge_and_unload",
    "print_trainable_parameters", "rename_adapter", "replace_linear", "route", "save_adapter", "set_adapter",
]  # fmt: skip
