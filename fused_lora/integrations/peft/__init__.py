"""PEFT: its LoRA linears computed by this package's kernels, in place, with everything else as it was."""

from .accelerate import AccelerateReport, accelerate, restore

__all__ = ["AccelerateReport", "accelerate", "restore"]
