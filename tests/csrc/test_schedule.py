"""The list of work of csrc's kernels, made on the CPU: all work once, and every item after those it waits for."""

import itertools

import pytest

from tests.csrc.items import GRADIENT_A, GRADIENT_B, SHRINK, TILE, Item
from tests.csrc.passes import (
    CHAIN_FLAGS,
    FLAG_ROWS,
    NONE,
    PAIR_ROWS,
    Part,
    Pass,
    promised_floats,
    some_passes,
)

ROW_FLAGS = PAIR_ROWS // FLAG_ROWS


def starts(size: int, each: int) -> range:
    return range(0, size, each)


def needs_low(each: Pass) -> list[int]:
    return [i for i, part in enumerate(each.parts[: each.summed]) if part.r and (each.wants_out or part.wants_a)]


def made_low(item: Item) -> list[tuple[int, int]]:
    """Parts and first rows of the low that it makes."""
    if item.work == SHRINK:
        return [(item.part, row) for row in item.shrunk_rows]
    return [(item.part, item.row)] if item.rides else []


def raised(item: Item) -> set[int]:
    if item.work in (GRADIENT_A, GRADIENT_B):
        return set(range(item.raises, item.raises + CHAIN_FLAGS))
    rows = [row - item.row for _, row in made_low(item) if item.raises != NONE]
    return {item.raises + row // FLAG_ROWS + i for row in rows for i in range(ROW_FLAGS)}


def awaited(each: Pass, sizes, item: Item) -> set[int]:
    if item.work == TILE and item.waits != NONE:
        summed = each.parts[: each.summed] if each.backward or each.gated else [each.parts[item.part]]
        of_low = [item.waits + i * sizes.low_flags for i, part in enumerate(summed) if part.r]
        return {flag + i for flag in of_low for i in range(ROW_FLAGS)}
    found = set()
    if item.work == GRADIENT_A and item.waits != NONE:
        found = set(range(item.waits, item.waits + item.rows // FLAG_ROWS))
    if item.work in (GRADIENT_A, GRADIENT_B) and not item.is_first:
        found |= {flag - sizes.chain_flags for flag in raised(item)}
    return found


def wanted_tiles(each: Pass, sizes) -> set[tuple[int, int, int]]:
    own = each.parts[:1] if each.backward or each.gated else each.parts
    rows = starts(each.M, PAIR_ROWS)
    return {
        (i, row, col)
        for i, part in enumerate(own if each.wants_out else ())
        for row, col in itertools.product(rows, starts(part.cols, sizes.tile_cols))
    }


def check_ring(each: Pass, sizes, items: list[Item]) -> None:
    """Tiles of a column begin behind all those that read their weights from the same place before."""
    ring, tiles = sizes.ring, [item for item in items if item.work == TILE]
    if not any(part.stored for part in each.parts[: each.summed]) or not tiles:
        assert (ring.tiles, ring.pieces, ring.bytes) == (0, 0, 0)
        assert all(item.own == 0 for item in tiles)
        return
    rows, block_cols = -(-each.M // PAIR_ROWS), each.block_n
    column_of = [(item.raises - ring.done) // (2 * rows) for item in tiles]
    columns = max(column_of) + 1
    assert sorted(item.raises for item in tiles) == list(range(ring.done, ring.done + 2 * rows * columns, 2))
    assert all(item.own == column % ring.tiles * block_cols for item, column in zip(tiles, column_of, strict=True))
    places = {column: [i for i, own in enumerate(column_of) if own == column] for column in range(columns)}
    for column in range(ring.tiles, columns):
        assert max(places[column - ring.tiles]) < min(places[column])
    depths = [part.depth for part in each.parts[: each.summed if each.backward else 1]]
    along, across = (64, 128) if each.backward else (128, 64)  # of a piece
    assert ring.of_tile == block_cols // across * sum(-(-depth // along) for depth in depths)
    assert ring.pieces == ring.of_tile * columns
    assert ring.ready % 4 == ring.ready_stride % 4 == 0
    assert ring.ready + ring.ready_stride * columns <= ring.done <= sizes.flags - 2 * rows * columns
    # Never a whole weight but of a few columns, and about what stays in the L2 cache.
    assert ring.tiles <= max(2, -(-3 * columns // 4))
    assert ring.bytes <= max(64 << 20, 2 * 2 * block_cols * sum(depth + 64 for depth in depths))
    needed = ring.stride * (sum(depths) if each.backward else ring.tiles * block_cols)
    assert 2 * needed <= ring.bytes


def check_gradients(each: Pass, sizes, items: list[Item]) -> None:
    """Each column of a gradient once, in slices that follow one another from the first row to the last."""
    for work, wants, size in ((GRADIENT_A, "wants_a", "cols"), (GRADIENT_B, "wants_b", "depth")):
        slices = {}
        for item in items:
            if item.work == work:
                slices.setdefault((item.part, item.col), []).append(item)
        assert set(slices) == {
            (i, col)
            for i, part in enumerate(each.parts)
            for col in starts(getattr(part, size) if getattr(part, wants) else 0, sizes.gradient_cols)
        }
        for (part, _), own in slices.items():
            assert [item.row for item in own] == [0, *itertools.accumulate(item.rows for item in own[:-1])]
            assert own[-1].row < each.M <= own[-1].row + own[-1].rows
            assert [item.is_first for item in own] == [True] + [False] * (len(own) - 1)
            assert [item.is_last for item in own] == [False] * (len(own) - 1) + [True]
            for before, after in itertools.pairwise(own):
                assert after.raises - before.raises == sizes.chain_flags
            makes_low = work == GRADIENT_A and part < each.summed
            assert all((item.waits == part * sizes.low_flags + item.row // FLAG_ROWS) == makes_low for item in own)
            assert makes_low or {item.waits for item in own} == {NONE}


def check(each: Pass, sizes, items: list[Item]) -> None:
    row_pairs = -(-each.M // PAIR_ROWS)
    assert sizes.low_flags == ROW_FLAGS * row_pairs
    assert sizes.floats <= promised_floats(each)
    low = [made for item in items for made in made_low(item)]
    assert sorted(low) == sorted(itertools.product(needs_low(each), starts(each.M, PAIR_ROWS)))
    tiles = [(item.part, item.row, item.col) for item in items if item.work == TILE]
    assert sorted(tiles) == sorted(wanted_tiles(each, sizes))
    check_gradients(each, sizes, items)
    check_ring(each, sizes, items)
    for item in items:
        assert item.work != TILE or (item.waits == NONE) == (item.rides or not needs_low(each))
        if made_low(item) and not (item.rides and item.raises == NONE):
            assert item.raises == item.part * sizes.low_flags + item.row // FLAG_ROWS
    so_far = set()
    for item in items:
        assert awaited(each, sizes, item) <= so_far, "an item waits only for earlier ones"
        own = raised(item)
        assert not own & so_far, "a flag has one writer"
        assert all(0 <= flag < sizes.flags for flag in own)
        so_far |= own


def test_all_work_once_and_in_an_order_that_can_finish(list_work):
    passes = list(some_passes(400))
    listed = list(list_work(passes))
    assert len(listed) == len(passes)
    for each, (sizes, items) in zip(passes, listed, strict=True):
        check(each, sizes, items)
    assert {any(item.rides for item in items) for _, items in listed} == {True, False}, "some ride and some do not"


def test_the_check_can_fail(list_work):
    parts = (Part(512, 512, 16, True, True), Part(512, 264, 16, True, True))
    each = Pass(6000, True, False, True, False, 256, 66, parts, 2)
    ((sizes, items),) = list_work([each])
    check(each, sizes, items)
    first_tile = next(number for number, item in enumerate(items) if item.work == TILE)
    for wrong in (
        items[:-1],
        [*items, items[-1]],
        items[first_tile:] + items[:first_tile],
        items[::-1],
        [item._replace(waits=NONE) if item.work == TILE else item for item in items],
        [item._replace(raises=0) if item.work == GRADIENT_A else item for item in items],
    ):
        with pytest.raises((AssertionError, KeyError)):
            check(each, sizes, wrong)
