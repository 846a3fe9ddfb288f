"""What following.py knows of the values in a function."""

from dataclasses import dataclass

UNKNOWN = object()


@dataclass(eq=False)
class Value:
    """What an expression gives: an object that is known, or one known by its identity alone."""

    known: object = UNKNOWN
    shares: frozenset["Value"] = frozenset()  # whose memory it may be, and theirs, besides its own
    given: bool = False  # certainly not None

    @property
    def is_known(self) -> bool:
        return self.known is not UNKNOWN

    @property
    def memory(self) -> frozenset["Value"]:
        found, new = set(), {self}
        while new:
            found |= new
            new = frozenset().union(*(each.shares for each in new)) - found
        return frozenset(found)

    @property
    def truth(self) -> bool | None:
        """None where it is not known."""
        known = self.known
        return bool(known) if known is None or isinstance(known, (bool, int, str)) else None


@dataclass
class Called:
    """A child called with one value, in a branch; without a value, in a way that says nothing."""

    child: str
    value: Value | None
    path: tuple

    def __post_init__(self):
        self.memory = frozenset() if self.value is None else self.value.memory  # by then


def memory_of(values) -> frozenset[Value]:
    """All that the values may share; constants and functions are no tensors."""
    return frozenset().union(*(value.memory for value in values if not value.is_known))


def link(values) -> None:
    """From now on they may share: one was put where another is found."""
    memory = memory_of(values)
    for each in memory:
        each.shares |= memory


def merged(scopes: list[dict[str, Value]]) -> dict[str, Value]:
    """Names after branches: of which each may be what one of them made it."""
    names = set().union(*scopes)
    found = {name: [scope[name] for scope in scopes if name in scope] for name in names}
    return {
        name: values[0] if all(value is values[0] for value in values) else Value(shares=memory_of(values))
        for name, values in found.items()
    }


def is_given(value: Value) -> bool:
    return value.given or (value.is_known and value.known is not None)
