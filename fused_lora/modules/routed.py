"""What a route says of a bank: which of its adapters have which ranks of a pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import segments
from ..ops import Adapter, Routed


class Laid:
    """What a route says of banks in which its adapters have the same places."""

    def __init__(self, paths: Sequence[tuple[str, ...]], places: dict, window: int, device: torch.device):
        paths = [[name for name in path if name in places] for path in paths]
        self.plan = segments.make_plan([[places[name] for name in path] for path in paths], window)
        self.constants = segments.constants(self.plan, device)
        named = {place: name for name, place in places.items()}
        begins = self.plan.begins()
        self.names = tuple(named[place] for place in begins)
        self.lies = [(place.rank, found) for place, found in begins.items()]


class OfBank:
    """What a route says of one bank."""

    def __init__(self, bank, names: Sequence[str], laid: Laid):
        self.known = {name: _serial(bank, name) for name in names}
        self.plan, self.constants, self.names, self.lies = laid.plan, laid.constants, laid.names, laid.lies

    def check(self, bank) -> None:
        """Whether the bank's adapters are those that it had. By numbers, which compiled programs are guarded by."""
        if [_serial(bank, name) for name in self.known] != list(self.known.values()):
            raise RuntimeError("adapters were deleted, renamed or added since the route was made: make a new one")

    def routed(self, bank, route, x: Tensor) -> Routed:
        self.check(bank)
        each = zip(*bank.all_factors(self.names), self.lies, strict=True)
        adapters = tuple(Adapter(A, B, rank, begins) for A, B, (rank, begins) in each)
        return bank.routed(self.names, route.tables(self.plan, self.constants, x), self.plan.window, adapters)


def _serial(bank, name: str) -> int:
    return bank.adapters[name].serial if name in bank.adapters else -1
