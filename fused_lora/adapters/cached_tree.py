"""CachedTree: a saved tree of adapters whose deltas are in an AdapterCache."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..modules import set_adapter
from .cache import AdapterCache, CacheRoute
from .nodes import Nodes, read_index


class CachedTree(Nodes):
    """The nodes of a folder that AdapterTree.save wrote, each delta an adapter of a cache: thousands of nodes in the
    host's memory, and in slots those that are computed with.

        tree = CachedTree(cache, "tree")
        with tree.route(["law", "english"]):    # rows of one batch at different nodes
            ...
        tree.switch("law")                      # all rows, from now on: what both paths have does not move

    A node's deltas take a slot each, from the root down to it. To train, move or merge nodes, load them as an
    AdapterTree. Raises ValueError naming the argument, RuntimeError where slots do not suffice; nothing has changed
    then.
    """

    def __init__(self, cache: AdapterCache, folder: str | os.PathLike):
        super().__init__()
        self._cache = cache
        self._at: tuple[str, ...] = ()  # the deltas to which switch() has brought the model
        nodes = read_index(Path(folder))
        known = sorted(name for name in nodes if name in cache)
        if known:
            raise ValueError(f"cache must have no adapters of the tree's names, got {', '.join(known)}")
        self._parents = {name: node["parent"] for name, node in nodes.items()}
        self._deltas = {name for name, node in nodes.items() if node["delta"]}
        added = []
        try:
            for name in filter(self._deltas.__contains__, nodes):
                cache.add(name, Path(folder) / name)
                added.append(name)
        except BaseException:
            for name in added:
                cache.remove(name)
            raise

    def has_delta(self, name: str) -> bool:
        """Whether a node has a delta, which the cache then must have."""
        self._check("name", name)
        return name in self._deltas

    def route(self, names: str | Sequence[str], rows: Sequence[int] | Tensor | None = None) -> CacheRoute:
        """The cache's route by nodes: "__base__" is W alone."""
        return self._cache.route(self.paths(names), rows)

    def switch(self, name: str) -> None:
        """Outside of route() all rows are at this node ("__base__": at none). What its path has and the one before had
        not is brought into slots, behind what the current stream computes."""
        (path,) = self.paths(name)
        with self._cache.pinning(path):
            set_adapter(self._cache.model, path)
        self._cache.await_arrival(path)
        self._cache.release(self._at)
        self._at = path

    def prefetch(self, names: Sequence[str]) -> None:
        """Begins to bring nodes' deltas into slots, and does not wait."""
        self._cache.prefetch(delta for path in self.paths(names) for delta in path)
