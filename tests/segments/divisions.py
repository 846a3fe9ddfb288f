"""Divisions of rows into segments, and their tables by plain loops."""

from dataclasses import dataclass

import torch

from fused_lora.segments import BLOCK, BOX, SLICE, Place, make_plan, size_of


def places_of(ranks):
    """Places in slabs, and the slabs' ranks: the largest first, so that each begins at a multiple of its size."""
    places, at = [None] * len(ranks), 0
    for adapter in sorted(range(len(ranks)), key=lambda each: -size_of(ranks[each])):
        places[adapter] = Place(at, size_of(ranks[adapter]))
        at += size_of(ranks[adapter])
    return places, -(-at // 256) * 256


@dataclass
class Division:
    """Segments (adapter, several or None; rows) of adapters with these ranks."""

    ranks: tuple[int, ...]
    segments: tuple[tuple[int | tuple[int, ...] | None, int], ...]
    behind: int = 0  # rows that no segment has

    @property
    def M(self):
        return sum(count for _, count in self.segments) + self.behind

    @property
    def adapters(self):
        """Of each row, all of them."""
        return [_path(adapters) for adapters, count in self.segments for _ in range(count)] + [()] * self.behind

    def ends(self, device="cpu"):
        counts = torch.tensor([count for _, count in self.segments], dtype=torch.int32, device=device)
        return counts.cumsum(0, dtype=torch.int32)

    def paths(self):
        """The adapters of each segment."""
        return [_path(adapters) for adapters, _ in self.segments]

    def plan(self):
        places, _ = places_of(self.ranks)
        window = max([BOX, *(place.size for place in places)])
        return make_plan([[places[adapter] for adapter in path] for path in self.paths()], window)

    def begins(self):
        """Of each adapter that has a segment, where its ranks begin among those of the windows: once in each."""
        found = {}
        for depth, level in enumerate(self.plan().levels):
            for path, begin in zip(self.paths(), level.begins, strict=True):
                if begin is not None and begin not in found.setdefault(path[depth], []):
                    found[path[depth]].append(begin)
        return found


def _path(adapters):
    return () if adapters is None else (adapters,) if isinstance(adapters, int) else adapters


DIVISIONS = {
    "one": Division((16,), ((0, 256),)),
    "two of one window": Division((16, 16), ((0, 100), (1, 300))),
    "odd": Division((16, 8, 4, 16, 3), ((0, 300), (1, 1), (2, 0), (3, 500), (4, 199))),
    "not in the slab's order": Division((16,) * 6, ((5, 70), (0, 200), (4, 40), (1, 300))),
    "one adapter in three segments": Division((16, 64), ((0, 200), (1, 300), (0, 100), (1, 20), (0, 0))),
    "mixed": Division((128, 16, 8, 64, 33), ((1, 300), (0, 200), (2, 0), (4, 500), (3, 500))),
    "the largest": Division((256, 16, 100), ((1, 31), (0, 290), (2, 300))),
    "without adapters in between": Division((16,) * 3, ((None, 300), (0, 10), (None, 270), (1, 20), (None, 1), (2, 3))),
    "without adapters": Division((16,), ((None, 300), (0, 0))),
    "nothing but rows behind": Division((16,), (), behind=77),
    "rows behind": Division((16, 16), ((0, 100), (1, 30)), behind=300),
    "empty ones": Division((16,) * 24, tuple((i, {5: 77, 15: 300, 20: 400}.get(i, 0)) for i in range(24))),
    "a row each": Division((16,) * 300, tuple((i, 1) for i in range(300))),
    "sums of two": Division((16, 8, 64), (((0, 1), 300), ((2, 0), 100), (None, 20), (1, 5), ((0, 1), 90))),
    "a tree": Division((16,) * 4 + (128,), ((0, 40), ((0, 1), 200), ((0, 1, 2), 30), ((0, 1, 4), 250), ((0, 3), 99))),
    "ranks 1 to 9": Division(tuple(range(1, 10)), ((0, 2), *((i, 3 * i) for i in range(1, 8)), (8, 2))),
}  # fmt: skip


def tables_by_loops(division):
    """(blocks, windows, rows) as lists, of all levels one after another."""
    plan = division.plan()
    all_blocks, all_windows, all_rows, boxes = [], [], [], 0
    for number, level in enumerate(plan.levels):
        blocks, windows, rows, boxes = _level_by_loops(division, plan.window, level, number, len(all_windows), boxes)
        all_blocks, all_windows, all_rows = all_blocks + blocks, all_windows + windows, all_rows + rows
    return all_blocks, all_windows, all_rows


def _level_by_loops(division, size, level, number, passed, boxes):
    slices = size // SLICE
    rows = []
    for (_, count), begin, place in zip(division.segments, level.begins, level.places, strict=True):
        word = (0, 0) if place is None else (begin // SLICE | place.size // SLICE << 24, place.rank // SLICE)
        rows += [word] * count
    blocks = -(-division.M // BLOCK)
    rows += [(0, 0)] * (blocks * BLOCK - len(rows))
    begins = [sum(count for _, count in division.segments[:i]) for i in range(len(division.segments) + 1)]
    windows = [(window.rank, begins[window.first], begins[window.last + 1], number) for window in level.windows]
    found = []
    for block in range(blocks):
        first_row = block * BLOCK
        window = 0
        while window < len(windows):
            _, begin, end, _ = windows[window]
            if end > first_row or begin == end >= first_row:
                break
            window += 1
        own = [word for word, _ in rows[first_row : first_row + BLOCK] if word >> 24]
        if not own:
            found.append((passed + window, boxes, 0, 0))
            continue
        low = min(word & 0xFFFFFF for word in own) - slices * (passed + window)
        high = max((word & 0xFFFFFF) + (word >> 24) for word in own) - slices * (passed + window)
        found.append((passed + window, boxes, low, high))
        boxes += -(-high // slices) * size // BOX
    return found, windows, rows, boxes
