"""Adapters as files, those of PEFT, and as trees."""

from .loading import load_adapter
from .saving import save_adapter
from .tree import AdapterTree

__all__ = ["AdapterTree", "load_adapter", "save_adapter"]
