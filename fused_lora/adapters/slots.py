"""Slots: where adapters of a cache lie on a device, and what must have happened before somebody reads them."""

import torch

from ..segments import Place


class Slot:
    """Room for one adapter in every bank, filled on streams of their own."""

    def __init__(self, places: dict[str, Place]):
        self.places = places
        self.name: str | None = None
        self.ready: torch.Event | None = None  # behind its copies
        self.scaled: torch.Event | None = None  # behind its scales, which the stream that asked for it writes
        self.used: torch.Event | None = None  # behind the last kernels that read it
        self.is_differentiated = False  # so that backward passes may have read it since

    def await_arrival(self) -> None:
        """What the current stream computes from now on finds the adapter."""
        _await(self.ready)
        _await(self.scaled)

    def await_scales(self, used: torch.Event | None) -> None:
        """The current stream may write the scales: they are there, where they are not to be written again, and who has
        read them is done."""
        _await(self.scaled)
        _await(used)


def _await(event: torch.Event | None) -> None:
    if event is not None:
        torch.cuda.current_stream().wait_event(event)
