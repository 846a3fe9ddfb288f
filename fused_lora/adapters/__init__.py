"""Adapters as files, those of PEFT, and as trees, and a cache of them."""

from .cache import AdapterCache
from .cached_tree import CachedTree
from .loading import load_adapter
from .saving import save_adapter
from .tree import AdapterTree

__all__ = ["AdapterCache", "AdapterTree", "CachedTree", "load_adapter", "save_adapter"]
