"""The nodes of a tree of adapters, and the file that says what is under what."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from .. import whole_files
from ..modules.routing import BASE, check_name

INDEX = "tree.json"


class Nodes:
    """Names, each with the one above it. Raises ValueError naming the argument for nodes that are not there."""

    def __init__(self):
        self._parents: dict[str, str | None] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._parents

    def _in_order(self) -> list[str]:
        """Depth first."""

        def below(parent: str | None) -> Iterable[str]:
            for name in self.children(parent):
                yield name
                yield from below(name)

        return list(below(None))

    def children(self, name: str | None) -> list[str]:
        """Of a node; of None the roots."""
        return [child for child, parent in self._parents.items() if parent == name]

    def parent(self, name: str) -> str | None:
        """Of a node; None of a root."""
        self._check("name", name)
        return self._parents[name]

    def path(self, name: str) -> list[str]:
        """The nodes from the root down to it."""
        self._check("name", name)
        path = [name]
        while (above := self._parents[path[0]]) is not None:
            path.insert(0, above)
        return path

    def has_delta(self, name: str) -> bool:
        """Whether there is an adapter of a node's name."""
        raise NotImplementedError

    def paths(self, names: str | Sequence[str]) -> list[tuple[str, ...]]:
        """What each entry of a route's names computes with: nothing for "__base__"."""
        each = [names] if isinstance(names, str) else names
        return [() if name == BASE else self.deltas(name) for name in each]

    def deltas(self, name: str) -> tuple[str, ...]:
        """The adapters that a node computes with."""
        return tuple(node for node in self.path(name) if self.has_delta(node))

    def _check(self, argument: str, name: str) -> None:
        if name not in self._parents:
            raise ValueError(f"{argument} must be a node ({', '.join(self._parents) or 'there is none'}), got {name!r}")


def check_folder(argument: str, name: str) -> None:
    """Whether an adapter and its folder may be called so."""
    check_name(argument, name)
    if "/" in name or "\\" in name:
        raise ValueError(f"{argument} must have no slashes, since its folder has its name, got {name!r}")


def read_index(folder: Path) -> dict[str, dict]:
    """Nodes by name, parents before their children."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder with a tree of adapters")
    with whole_files.files_of(folder) as place:
        try:
            nodes = json.loads(place(INDEX).read_text())["nodes"]
            known: set[str | None] = {None}
            for name, node in nodes.items():
                check_folder("a node", name)
                if node["parent"] not in known or type(node["delta"]) is not bool:
                    raise ValueError(f"{name} has the parent {node['parent']!r}")
                known.add(name)
        except FileNotFoundError:
            raise ValueError(f"{folder} is no tree of adapters: it has no {INDEX}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / INDEX} is damaged: {error}") from None
    return nodes
