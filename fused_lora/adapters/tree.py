"""AdapterTree: adapters over adapters, of which a node computes with all from the root down to its own."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import checks, whole_files
from ..modules import adapter_parameters, add_adapter, delete_adapter, rename_adapter, route, set_adapter
from ..modules.banks import banks_with
from ..modules.protocol import is_bank
from ..modules.routing import BASE
from ..ops import merge_
from . import files
from .joining import join
from .loading import load_adapter
from .nodes import INDEX, Nodes, check_folder, read_index
from .saving import contents_of, warn_of_others


class AdapterTree(Nodes):
    """Nodes over one base. A node has a delta, which is an adapter of the model's banks under the node's name, or none;
    a model at a node computes W + the sum of the deltas from the root down to it. There may be several roots.

        tree = AdapterTree(model)
        tree.add("english", r=16, lora_alpha=32, target_modules="all-linear")
        tree.add("law", parent="english", r=8, lora_alpha=16, target_modules="all-linear")
        tree.train("law")                       # english is frozen
        with tree.route(["english", "law"]):    # rows of one batch at different nodes
            ...
        tree.switch("law")                      # all rows, from now on: no factor moves

    W is never changed but by merge_into_base. Raises ValueError naming the argument for nodes that are not there.
    LoRA: Hu et al. 2021, arXiv:2106.09685.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self._at: str | None = None  # where switch() has brought the model

    def __str__(self) -> str:
        """A line a node, children under their parents."""
        return "\n".join(f"{'  ' * (len(self.path(name)) - 1)}{name}{self._words(name)}" for name in self._in_order())

    def _words(self, name: str) -> str:
        if not self.has_delta(name):
            return " (no delta)"
        ranks = sorted({bank.adapters[name].r for bank in banks_with(self.model, name).values()})
        return f" (r = {', '.join(map(str, ranks))})"

    # ---- what there is

    def has_delta(self, name: str) -> bool:
        """Whether the model has an adapter of a node's name."""
        self._check("name", name)
        return any(is_bank(bank) and name in bank.adapters for bank in self.model.modules())

    # ---- computing

    def route(self, names: str | Sequence[str], rows: Sequence[int] | Tensor | None = None) -> route:
        """fused_lora.route by nodes, of the tree as it is now: "__base__" is W alone."""
        return route(self.model, self.paths(names), rows)

    def switch(self, name: str) -> None:
        """Outside of route() all rows are at this node ("__base__": at none), also when the tree changes."""
        set_adapter(self.model, *self.paths(name))
        self._at = name

    def _changed(self) -> None:
        """Whoever was switched to a node that is there still is at it."""
        if self._at is not None and (self._at == BASE or self._at in self._parents):
            self.switch(self._at)
        else:
            self._at = set_adapter(self.model, None)

    def train(self, name: str) -> list[nn.Parameter]:
        """Its factors train and those of all other nodes do not; returns them, for an optimizer."""
        self._check_delta(name)
        for node in self._parents:
            for factor in adapter_parameters(self.model, node) if self.has_delta(node) else ():
                factor.requires_grad_(node == name)
        return adapter_parameters(self.model, name)

    def _check_delta(self, name: str) -> None:
        if not self.has_delta(name):
            raise ValueError(f"name must be a node with a delta, got {name!r}")

    # ---- growing and pruning

    def add(self, name: str, parent: str | None = None, **options) -> None:
        """A node under another one, or a root. Its delta is a new adapter where options are given, which are
        add_adapter's; else the model's adapter of this name, or none."""
        check_folder("name", name)
        if name in self._parents:
            raise ValueError(f"name must be new, got {name!r}, which is a node")
        if parent is not None:
            self._check("parent", parent)
        if options:
            add_adapter(self.model, name, **options)
        self._parents[name] = parent
        self._changed()

    def remove(self, name: str) -> None:
        """A node without children, and its delta."""
        self._check("name", name)
        if self.children(name):
            raise ValueError(f"name must be a node without children, got {name!r}: remove or move them first")
        if self.has_delta(name):
            delete_adapter(self.model, name)
        del self._parents[name]
        self._changed()

    def rename(self, old: str, new: str) -> None:
        """A node, and its delta: the same parameters."""
        self._check("old", old)
        check_folder("new", new)
        if new in self._parents:
            raise ValueError(f"new must be the name of no node, got {new!r}")
        if self.has_delta(old):
            rename_adapter(self.model, old, new)
        renamed = {new if name == old else name: parent for name, parent in self._parents.items()}
        self._parents = {name: new if parent == old else parent for name, parent in renamed.items()}
        self._at = new if self._at == old else self._at
        self._changed()

    def move(self, name: str, parent: str | None) -> None:
        """Under another node, or to the roots: its delta stays what it is, and adds to another sum."""
        self._check("name", name)
        if parent is not None and name in self.path(parent):
            raise ValueError(f"parent must not be {name!r} or below it, got {parent!r}")
        self._parents[name] = parent
        self._changed()

    def detach(self, name: str) -> None:
        """A root that computes what the node did: the deltas above it become part of its own."""
        join(self.model, name, self.deltas(name))
        self._parents[name] = None
        self._changed()

    def merge_into_parent(self, name: str) -> None:
        """Its delta becomes part of its parent's, and its children are its parent's. The parent then computes what the
        node did; so it must have no other children, which would compute something else."""
        parent = self.parent(name)
        if parent is None:
            raise ValueError(f"name must be no root, got {name!r}: merge_into_base merges it into W")
        others = [child for child in self.children(parent) if child != name]
        if others:
            raise ValueError(f"{parent!r} must have no other children, got {', '.join(others)}: move them first")
        join(self.model, parent, [node for node in (parent, name) if self.has_delta(node)])
        for child in self.children(name):
            self._parents[child] = parent
        self.remove(name)

    @torch.no_grad()
    def merge_into_base(self, name: str) -> None:
        """W += scale B A of a root, rounded once to W's dtype as fused_lora.merge_ does; its children become roots. It
        must be the only root, since W is everybody's. NotImplementedError for a W in a format."""
        others = [root for root in self.children(None) if root != name]
        if self.parent(name) is not None or others:
            raise ValueError(f"name must be the only root, got {name!r}: beside {', '.join(others) or 'its parent'}")
        banks = banks_with(self.model, name) if self.has_delta(name) else {}
        for layer, bank in banks.items():
            if not all(factor.isfinite().all() for factor in bank.factors(name)):
                raise ValueError(f"the factors of {layer} must be finite to be merged")
        for layer, bank in banks.items():
            checks.check_in_full(f"{layer}.weight", bank.frozen_weight)
        for bank in banks.values():
            merge_(bank.weight, *bank.factors(name), bank.adapters[name].scaling)
        for child in self.children(name):
            self._parents[child] = None
        self.remove(name)

    # ---- files

    def save(self, folder: str | os.PathLike) -> None:
        """A folder with an adapter of PEFT's for each delta, and tree.json, which says what is under what: whenever the
        process is killed, load finds the tree that was there or this one."""
        nodes = {name: {"parent": self._parents[name], "delta": self.has_delta(name)} for name in self._in_order()}
        text = json.dumps({"nodes": nodes}, indent=2)
        every = {INDEX: lambda path: path.write_text(text)}
        deltas = {name: contents_of(self.model, name) for name in filter(self.has_delta, nodes)}
        warn_of_others(self.model, (tensor for _, tensors in deltas.values() for tensor in tensors.values()), 3)
        for name, contents in deltas.items():
            every |= {f"{name}/{file}": writer for file, writer in files.writers(*contents).items()}
        whole_files.write_together(Path(folder), every)

    @classmethod
    def load(cls, model: nn.Module, folder: str | os.PathLike, lora_dtype: torch.dtype | None = None) -> "AdapterTree":
        """What save wrote, over a model that has no adapters of these names. ValueError where it has, and where the
        index or an adapter is damaged or of another base: the model has none of them then."""
        folder, tree = Path(folder), cls(model)
        nodes = read_index(folder)
        known = sorted(
            name for name in nodes if any(name in bank.adapters for bank in filter(is_bank, model.modules()))
        )
        if known:
            raise ValueError(f"model must have no adapters of the tree's names, got {', '.join(known)}")
        try:
            with whole_files.files_of(folder):
                tree._load_nodes(folder, nodes, lora_dtype)
        except BaseException:
            for name in reversed(list(tree._parents)):
                tree.remove(name)
            raise
        return tree

    def _load_nodes(self, folder: Path, nodes: dict[str, dict], lora_dtype: torch.dtype | None) -> None:
        for name, node in nodes.items():
            if node["delta"]:
                load_adapter(self.model, folder / name, name, lora_dtype)
            self.add(name, node["parent"])
