"""Adapters as files: those of PEFT, written from LoRALinear layers and read into them."""

from .loading import load_adapter
from .saving import save_adapter

__all__ = ["load_adapter", "save_adapter"]
