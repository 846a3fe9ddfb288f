"""Reads a module's forward: which of its children it provably calls with one value that nobody changes in between."""

import inspect
import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace

from torch import nn

from .following import Follower
from .values import Called, Value

Groups = tuple[tuple[str, ...], ...]
MOST_TESTED = 4  # arguments: each doubles the cases


@dataclass(frozen=True)
class Reading:
    """Groups of children by name, for each case of which of the `tested` arguments are None.

    It holds for a module whose attributes are of the types in `relies_on`.
    """

    positional: tuple[str, ...] = ()
    tested: tuple[str, ...] = ()
    cases: dict[tuple[bool, ...], Groups] = field(default_factory=dict)
    unknown: Groups = ()
    relies_on: tuple[tuple[str, type], ...] = ()

    @property
    def every(self) -> list[tuple[str, ...]]:
        """The groups of all cases, larger ones first."""
        found = {group for groups in (*self.cases.values(), self.unknown) for group in groups}
        return sorted(found, key=lambda group: (-len(group), group))

    def among(self, names: set[str]) -> "Reading":
        """The same of some of the children, and of no more arguments than matter to them."""
        cases = {case: _among(groups, names) for case, groups in self.cases.items()}
        unknown, tested = _among(self.unknown, names), self.tested
        if all(groups == unknown for groups in cases.values()):
            cases, tested = {}, ()
        return replace(self, cases=cases, unknown=unknown, tested=tested)

    def groups(self, module: nn.Module, args: tuple, kwargs: dict) -> Groups:
        """Those of a call."""
        for name, kind in self.relies_on:
            if type(getattr(module, name, None)) is not kind:
                return ()
        if not self.tested:
            return self.unknown
        return self.cases[tuple(self._is_none(name, args, kwargs) for name in self.tested)]

    def _is_none(self, name: str, args: tuple, kwargs: dict) -> bool:
        if name in self.positional and (place := self.positional.index(name)) < len(args):
            return args[place] is None
        return kwargs.get(name) is None


def read(module: nn.Module) -> Reading | None:
    """The reading of a module's forward; None where it has no source that can be followed, or no groups."""
    outer = type(module).forward
    forward = inspect.unwrap(outer)
    try:
        signature = inspect.signature(forward)
        first, followers = _follow(module, forward, {})
        parameters = list(signature.parameters.values())[1:]
        certain = {each.name for each in parameters if each.default is None} - _known_to_wrappers(outer)
        tested = tuple(each.name for each in parameters if each.name in first & certain)[:MOST_TESTED]
        cases = {}
        for case in itertools.product((False, True), repeat=len(tested)):
            _, follower = _follow(module, forward, dict(zip(tested, case, strict=True)))
            cases[case] = _groups(follower.events)
    except Exception:  # whatever a source may hold that cannot be followed, it proves nothing
        return None
    positional = tuple(
        each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    )
    relies_on = tuple(followers.relies_on.items())
    reading = Reading(positional, tested, cases, _groups(followers.events), relies_on)
    return reading if reading.every else None


def _known_to_wrappers(function) -> set[str]:
    """Names that the functions around a forward may be about: those arguments they may rename or fill in."""
    names: set[str] = set()
    while hasattr(function, "__wrapped__"):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        for each in (*function.__code__.co_consts, *cells):
            names.update(_strings(each))
        function = function.__wrapped__
    return names


def _strings(value) -> set[str]:
    if isinstance(value, str):
        return {value}
    return {each for each in value if isinstance(each, str)} if isinstance(value, (tuple, list, set, dict)) else set()


def _follow(module: nn.Module, forward, is_none: dict[str, bool]) -> tuple[set[str], Follower]:
    """Names of arguments that were compared with None without being known to be or not, and what was found."""
    follower = Follower(module)
    names = list(inspect.signature(forward).parameters)[1:]
    arguments = {name: _argument(is_none.get(name)) for name in names}
    follower.call(forward, [Value(known=module)], arguments)
    return {name for name, value in arguments.items() if value in follower.tested}, follower


def _argument(is_none: bool | None) -> Value:
    return Value(known=None) if is_none else Value(given=is_none is False)


def _among(groups: Groups, names: set[str]) -> Groups:
    kept = (tuple(name for name in group if name in names) for group in groups)
    return tuple(group for group in kept if len(group) > 1)


def _groups(events: list) -> Groups:
    """Children called with the same value in the same branch, before anything may have changed it."""
    running: dict[tuple, list[str]] = {}
    memory: dict[tuple, frozenset] = {}
    found: list[list[str]] = []
    calls: dict[str, list[Called]] = defaultdict(list)
    for event in events:
        if event is None:
            running = {}
            continue
        if isinstance(event, frozenset):  # memory that may be changed
            running = {key: group for key, group in running.items() if not memory[key] & event}
            continue
        calls[event.child].append(event)
        if event.value is None:
            continue
        key = (event.value, event.path)
        if key not in running:
            running[key], memory[key] = [], event.memory
            found.append(running[key])
        running[key].append(event.child)
    once = {name for name, of_child in calls.items() if len(of_child) == 1 and of_child[0].value is not None}
    groups = (tuple(name for name in group if name in once) for group in found)
    return tuple(group for group in groups if len(group) > 1)
