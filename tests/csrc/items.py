"""csrc/work/item.h: what a list is made of, as the programs print_items.h is in write it."""

import itertools
from typing import NamedTuple

SHRINK, TILE, GRADIENT_A, GRADIENT_B = range(4)


class Item(NamedTuple):
    work: int
    bits: int
    part: int
    row: int
    rows: int
    col: int
    waits: int
    raises: int
    own: int  # a shrink item's stride, or the first of an item's ranks; of a half, the number of the item that was cut

    @property
    def shrunk_rows(self) -> range:
        return range(self.row, self.row + self.rows, self.own)

    @property
    def is_first(self) -> bool:
        return bool(self.bits & 1)

    @property
    def is_last(self) -> bool:
        return bool(self.bits & 2)

    @property
    def rides(self) -> bool:
        return bool(self.bits & 4)

    @property
    def is_half(self) -> bool:
        return bool(self.bits & 8)


def read_items(text: str) -> list[Item]:
    numbers = map(int, text.split())
    return list(itertools.starmap(Item, zip(*[numbers] * len(Item._fields), strict=True)))
