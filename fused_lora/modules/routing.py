"""route: which adapter each row of a batch has, in all banks of a model, for a while."""

import threading
from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from .. import segments
from ..ops import Routed
from . import recomputing
from .protocol import is_bank
from .routed import Arrangement, BankRoute

BASE = "__base__"  # PEFT's name for none
MOST_SIZES = 64  # of batches, whose tables a route keeps


class _Thread(threading.local):
    def __init__(self):
        # Those around, the innermost last, each with the backward pass in which it was entered.
        self.routes: tuple[tuple[route, int | None], ...] = ()


thread = _Thread()


def check_name(argument: str, name: str) -> None:
    """Whether an adapter may be called so."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be a str, got {type(name).__name__}")
    if not name or "." in name or name == BASE:
        raise ValueError(f'{argument} must not be empty, have dots or be "{BASE}", got {name!r}')


class route:
    """with route(model, names): every row of x has the adapter of its name, in each of the model's LoRABank layers.

        names   one for all rows; or one for each sequence of the batch, or for each row, in their order; "__base__" for
                rows without an adapter, a tuple of names for those whose updates add up
        rows    instead of equal shares, how many rows each of the names has: ints, or an int tensor on either device;
                rows behind them have no adapter

    A bank that has no adapter of a name, which others have, computes its rows as the base does. Rows with one name that
    follow one another are a segment; names may come again. The fewer segments, the faster; the order does not matter.

    A backward pass, and what a checkpoint without reentry computes again, have the adapters of their forward, whatever
    was routed since. In captured CUDA graphs a route keeps its names, and divide() changes what rows they have. Threads
    have routes of their own; generators that take turns in one thread share them, and the innermost counts.

    Raises ValueError or TypeError naming the argument, also for a name that no bank of the model has.
    """

    @torch.inference_mode(False)  # what is kept may be read by a pass that is differentiated
    def __init__(
        self,
        model: nn.Module,
        names: str | Sequence[str | tuple[str, ...]],
        rows: Sequence[int] | Tensor | None = None,
    ):
        banks = {bank._key: bank for bank in model.modules() if is_bank(bank)}
        if not banks:
            raise ValueError("model must have a LoRABank, got none: add_adapter makes them")
        paths = paths_of(names)
        self._model, self._banks = model, list(banks.values())
        known = {name for bank in banks.values() for name in bank.adapters}
        unknown = sorted({name for path in paths for name in path} - known)
        if unknown:
            raise ValueError(
                f"names must be adapters of the model or {BASE!r}, got {', '.join(map(repr, unknown))}: it has "
                f"{', '.join(sorted(known)) or 'none'}"
            )
        self._device = next(iter(banks.values())).weight.device
        self._shares = len(paths)
        if rows is None:
            runs = [(path, len(list(run))) for path, run in groupby(paths)]
            self._paths, counts = [path for path, _ in runs], [count for _, count in runs]
        else:
            self._paths, counts = paths, rows
        self._is_divided, self.division = rows is not None, 0
        self._ends = _ends(counts, len(self._paths), self._device)
        self._counted = _total(counts)
        self._tables: dict[tuple, segments.Tables] = {}  # of the sizes that batches had last
        self._captured: dict[tuple, segments.Tables] = {}  # those that graphs read
        self._of_bank = self._plans(banks)

    def _plans(self, banks: dict) -> dict[int, BankRoute]:
        used = {name for path in self._paths for name in path}
        places = {
            key: {name: bank.adapters[name].place for name in used & bank.adapters.keys()}
            for key, bank in banks.items()
        }
        window = segments.window_of(place.size for found in places.values() for place in found.values())
        alike: dict[tuple, Arrangement] = {}  # by places, which many banks have alike
        names, found = [name for path in self._paths for name in path], {}
        for key, bank in banks.items():
            lies = tuple(places[key].items())
            if lies not in alike:
                alike[lies] = Arrangement(self._paths, places[key], window, self._device)
            found[key] = BankRoute(bank, names, alike[lies])
        return found

    def divide(self, rows: Sequence[int] | Tensor) -> None:
        """Other numbers of rows for the same names, in place: captured graphs see them, and nothing waits."""
        if not self._is_divided:
            raise ValueError("rows can change where route() was given rows")
        ends = _ends(rows, len(self._paths), self._device)
        self.division += 1
        self._ends.copy_(ends, non_blocking=True)
        self._counted = _total(rows)
        for (plan, M), found in (self._tables | self._captured).items():
            of = next(each.constants for each in self._of_bank.values() if each.plan == plan)
            for table, new in zip(found, segments.tables(plan, of, self._ends, M), strict=True):
                table.copy_(new)

    def __enter__(self) -> "route":
        for bank in self._banks:
            found = self._of_bank[bank._key]
            found.check(bank)
            bank.settle(found.names)
        thread.routes = (*thread.routes, (self, recomputing.in_backward()))
        return self

    def __exit__(self, *error) -> None:
        own = max(i for i, (found, _) in enumerate(thread.routes) if found is self)
        thread.routes = (*thread.routes[:own], *thread.routes[own + 1 :])

    def is_of(self, bank) -> bool:
        """Whether its model has a bank."""
        return any(module is bank for module in self._model.modules())

    def tables(self, plan: segments.Plan, of: Sequence[segments.Constants], x: Tensor) -> segments.Tables:
        """Of x's rows, the same object for all banks of one plan."""
        M = x.shape[:-1].numel()
        self._check_rows(x, M)
        if torch.compiler.is_compiling():
            return segments.tables(plan, of, self._ends_of(M), M)
        found, captures = self._tables.get((plan, M)), x.is_cuda and torch.cuda.is_current_stream_capturing()
        if found is None and captures:
            raise RuntimeError("a route must have computed a batch of this size before a CUDA graph is captured")
        if found is None:
            with torch.inference_mode(False):
                found = self._captured.get((plan, M)) or segments.tables(plan, of, self._ends_of(M), M)
            self._tables[plan, M] = found
            if len(self._tables) > MOST_SIZES:
                del self._tables[next(iter(self._tables))]
        if captures:
            self._captured[plan, M] = found
        return found

    def _check_rows(self, x: Tensor, M: int) -> None:
        """Whether names are of whole sequences, or of rows, and x has the rows that were counted on the host."""
        if self._is_divided:
            if self._counted is not None and not torch.compiler.is_compiling() and self._counted > M:
                raise ValueError(f"rows must add up to x's {M} rows at most, got {self._counted}: a sequence has many")
        elif M % self._shares:
            raise ValueError(f"x's {M} rows cannot be shared equally by {self._shares} names: give rows")
        elif x.dim() > 2 and x.shape[0] % self._shares and self._shares != M:
            raise ValueError(f"names must be of x's {x.shape[0]} sequences or {M} rows, got {self._shares}: give rows")

    def _ends_of(self, M: int) -> Tensor:
        return self._ends if self._is_divided else self._ends * (M // self._shares)


def set_adapter(model: nn.Module, name: str | tuple[str, ...] | None) -> None:
    """What all rows have outside of route(): an adapter, several that add up, or "__base__" for none. At first, and
    with None, nothing says it, and banks raise RuntimeError there. No factor moves.

    Raises ValueError or TypeError naming the argument, also for a name that no bank of the model has.
    """
    default = None if name is None else route(model, [name])
    for bank in filter(is_bank, model.modules()):
        bank._default = default


def paths_of(names: str | Sequence[str | tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The adapters of each entry of route's names."""
    if not isinstance(names, (str, list, tuple)):
        raise TypeError(f"names must be a str, a list or a tuple, got {type(names).__name__}")
    if not names:
        raise ValueError("names must have at least one entry")
    return [_path(each) for each in ([names] if isinstance(names, str) else names)]


def _path(names: str | Sequence[str]) -> tuple[str, ...]:
    """The adapters of a row, of which "__base__" is none."""
    path = tuple(names) if isinstance(names, (tuple, list)) else (names,)
    for name in path:
        if name != BASE:
            check_name("names", name)
    if len(set(path)) < len(path):
        raise ValueError(f"names must not have one twice for the same rows, got {path}")
    return tuple(name for name in path if name != BASE)


def _ends(rows: Sequence[int] | Tensor, names: int, device: torch.device) -> Tensor:
    if isinstance(rows, Tensor) and rows.dtype is torch.bool:
        raise ValueError("rows must be ints, got a tensor of torch.bool")
    if not isinstance(rows, Tensor):
        rows = list(rows)
        if any(type(count) is not int or count < 0 for count in rows):
            raise ValueError(f"rows must be ints of at least 0, got {rows}")
        host = torch.tensor(rows, dtype=torch.int32, device="cpu")
        rows = host.pin_memory() if device.type == "cuda" else host
    elif rows.device.type == "cpu" and rows.numel() and rows.min() < 0:
        raise ValueError(f"rows must be ints of at least 0, got {rows.tolist()}")
    if rows.shape != (names,) or rows.is_floating_point():
        raise ValueError(f"rows must be {names} ints, one for each of the names, got {tuple(rows.shape)} {rows.dtype}")
    return rows.to(device, torch.int32, non_blocking=True).cumsum(0, dtype=torch.int32)


def _total(rows: Sequence[int] | Tensor) -> int | None:
    """Known without asking a device."""
    if isinstance(rows, Tensor):
        return int(rows.sum()) if rows.device.type == "cpu" else None
    return sum(rows)


def current(bank, x: Tensor) -> Routed:
    """What a bank computes for x's rows now. RuntimeError outside of route()."""
    found = _route_of(bank)
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        bank.note_capture()
    return found._of_bank[bank._key].routed(bank, found, x)


def sources(bank) -> tuple:
    """What current() depends on, but for x."""
    found = _route_of(bank)
    return (found, *(factor for name in found._of_bank[bank._key].names for factor in bank.factors(name)))


def obstacle(bank) -> str | None:
    """Why no route says what adapters rows have, or None."""
    found = _find(bank)
    return found if isinstance(found, str) else None


def _route_of(bank) -> route:
    found = _find(bank)
    if isinstance(found, str):
        raise RuntimeError(found)
    return found


def _find(bank) -> route | str:
    compiling = torch.compiler.is_compiling()
    now = None if compiling else recomputing.in_backward()
    for found, entered_in in reversed(thread.routes):
        if bank._key in found._of_bank and (compiling or entered_in == now):
            return found if compiling else _left(bank, found)
    if not compiling and any(entered_in == now and found.is_of(bank) for found, entered_in in thread.routes):
        return "the LoRABank was added since the route was made: make a new one"
    if now is None and bank._default is not None:
        return bank._default if compiling else _left(bank, bank._default)
    if now is None:
        return (
            "a LoRABank computes within `with route(model, names)`, which says what adapter a row has, or after "
            "set_adapter(model, name), for all rows"
        )
    recalled = recomputing.recalled(bank._key)
    if recalled is None:
        return "a checkpoint computes a LoRABank again, and does not know which route it had: pass use_reentrant=False"
    found, division, changes = recalled
    if found.division != division:
        return "a checkpoint computes a LoRABank again, and its route has divided the rows anew since"
    if bank.changes != changes:
        return "a checkpoint computes a LoRABank again, whose lora_alpha or lora_dropout has been set since"
    return found


def _left(bank, found: route) -> route:
    recomputing.leave(bank._key, (found, found.division, bank.changes))
    return found
