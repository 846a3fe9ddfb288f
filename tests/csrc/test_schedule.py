"""The list of work of csrc's kernels, made on the CPU: all work once, and every item after those it waits for."""

import itertools

import pytest

from tests.csrc.passes import GRADIENT_A, GRADIENT_B, PAIR_ROWS, SHRINK, TILE, Part, Pass, promised_floats, some_passes


def places(items, keys_of):
    """Item numbers by what they do: each key once."""
    found = {}
    for number, item in enumerate(items):
        for key in keys_of(item):
            assert key not in found, f"{key} is in the list twice"
            found[key] = number
    return found


def shrunk(item):
    work, part, first, count, stride = item
    return [(part, first + i * stride) for i in range(count)] if work == SHRINK else []


def check(each, sizes, items):
    row_pairs, rides = sizes.row_pairs, sizes.rides
    assert row_pairs == -(-each.M // PAIR_ROWS)
    assert sizes.ready == 2 * row_pairs
    assert sizes.chains <= sizes.most_chains
    assert sizes.floats <= sizes.most_floats == promised_floats(each)
    low = places(items, shrunk)
    tiles = places(items, lambda item: [item[1:4]] if item[0] == TILE else [])
    if rides:
        assert not low
        low = {(0, pair): tiles[0, pair, 0] for pair in range(row_pairs)}
    needed = [i for i, part in enumerate(each.parts[: each.summed]) if part.r and (each.wants_out or part.wants_a)]
    assert set(low) == set(itertools.product(needed, range(row_pairs)))
    wanted = set()
    for i, part in enumerate(each.parts):
        has_tiles = each.wants_out and (not (each.backward or each.gated) or i == 0)
        tile_cols = each.block_n // (1 if each.backward or not each.gated else 2)
        assert sizes.tile_cols[i] == (-(-part.cols // tile_cols) if has_tiles else 0)
        wanted |= set(itertools.product([i], range(row_pairs), range(sizes.tile_cols[i])))
    assert set(tiles) == wanted
    for (i, pair, col), number in tiles.items():
        waited_for = needed if each.backward or each.gated else [part for part in needed if part == i]
        assert all(low[part, pair] < number for part in waited_for) or (rides and col == 0)
    gradients = 0
    firsts = sizes.slice_firsts()
    ends = dict(itertools.pairwise(firsts))
    assert firsts.pop() == row_pairs
    before = dict(zip(firsts[1:], firsts[:-1], strict=True))
    assert len(ends) == sizes.slices, "none is empty"
    for work, pairs, wants in ((GRADIENT_A, sizes.a_pairs, "wants_a"), (GRADIENT_B, sizes.b_pairs, "wants_b")):
        sums = places(items, lambda item, work=work: [item[1:4]] if item[0] == work else [])
        wanted = set()
        for i, part in enumerate(each.parts):
            assert (pairs[i] > 0) == getattr(part, wants)
            wanted |= set(itertools.product([i], firsts, range(pairs[i])))
        assert set(sums) == wanted
        gradients += len(sums)
        for i, first, col in sums:
            assert first == 0 or sums[i, before[first], col] < sums[i, first, col], "slices are chained in order"
            if work == GRADIENT_A:
                waited_for = range(first, ends[first])
                assert i >= each.summed or all(low[i, pair] < sums[i, first, col] for pair in waited_for)
    assert len(items) == len(set(low.values())) * (not rides) + len(tiles) + gradients


def test_all_work_once_and_in_an_order_that_can_finish(list_work):
    passes = list(some_passes(400))
    listed = list(list_work(passes))
    assert len(listed) == len(passes)
    for each, (sizes, items) in zip(passes, listed, strict=True):
        check(each, sizes, items)
    assert {bool(sizes.rides) for sizes, _ in listed} == {True, False}, "some ride and some do not"


def test_the_check_can_fail(list_work):
    parts = (Part(512, 512, 16, True, True), Part(512, 264, 16, True, True))
    each = Pass(6000, True, False, True, False, 256, 66, parts, 2)
    ((sizes, items),) = list_work([each])
    check(each, sizes, items)
    first_tile = next(number for number, item in enumerate(items) if item[0] == TILE)
    for wrong in (
        items[:-1],
        [*items, items[-1]],
        items[first_tile:] + items[:first_tile],
        items[::-1],
    ):
        with pytest.raises((AssertionError, KeyError)):
            check(each, sizes, wrong)
