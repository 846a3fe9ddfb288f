"""What a route says of a bank: which of its adapters have which ranks of a pass."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import segments
from ..ops import Adapter, Routed
from ..ops.autograd import watched


class Arrangement:
    """What a route says of banks in which its adapters have the same places."""

    def __init__(self, paths: Sequence[tuple[str, ...]], places: dict, window: int, device: torch.device):
        paths = [[name for name in path if name in places] for path in paths]
        self.plan = segments.make_plan([[places[name] for name in path] for path in paths], window)
        self.constants = segments.constants(self.plan, device)
        named = {place: name for name, place in places.items()}
        begins = self.plan.begins()
        self.names = tuple(named[place] for place in begins)
        self.adapters = tuple(Adapter(None, None, place.rank, found) for place, found in begins.items())


class BankRoute:
    """What a route says of one bank."""

    def __init__(self, bank, names: Sequence[str], arrangement: Arrangement):
        self.known = dict(zip(names, _serials(bank, names), strict=True))
        self.plan, self.constants = arrangement.plan, arrangement.constants
        self.names, self.adapters = arrangement.names, arrangement.adapters

    def check(self, bank) -> None:
        """Whether the bank's adapters are those that it had. By numbers, which compiled programs are guarded by."""
        if _serials(bank, self.known) != list(self.known.values()):
            raise RuntimeError("adapters were deleted, renamed or added since the route was made: make a new one")

    def routed(self, bank, route, x: Tensor) -> Routed:
        """What the bank computes for x's rows. Without gradients nobody reads factors but in the slabs."""
        self.check(bank)
        adapters = self._with_factors(bank) if torch.is_grad_enabled() or watched() else self.adapters
        return bank.routed(self.names, route.tables(self.plan, self.constants, x), self.plan.window, adapters)

    def _with_factors(self, bank) -> tuple[Adapter, ...]:
        each = zip(self.adapters, *bank.all_factors(self.names), strict=True)
        return tuple(Adapter(A, B, adapter.rank, adapter.begins) for adapter, A, B in each)


def _serials(bank, names: Iterable[str]) -> list[int]:
    adapters = bank.adapters
    return [adapters[name].serial if name in adapters else -1 for name in names]
