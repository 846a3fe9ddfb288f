"""Fused low-rank matmuls for PyTorch: LoRA linears whose base, update and gradients share their kernels."""

from .explain import explain
from .modules import LoRALinear, ReplaceReport, replace_linear
from .ops import lora_linear, merge_

__version__ = "0.1.0"
__all__ = ["LoRALinear", "ReplaceReport", "explain", "lora_linear", "merge_", "replace_linear"]
