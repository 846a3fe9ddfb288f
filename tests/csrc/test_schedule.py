"""The list of work of csrc's kernels, made on the CPU: all work once, and every item after those it waits for."""

import dataclasses
import itertools
import random
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

SHRINK, TILE, GRADIENT_A, GRADIENT_B = range(4)
PAIR_ROWS = 256


@pytest.fixture(scope="module")
def list_work(tmp_path_factory):
    """Runs list_work.cu on passes: (sizes, items) of each."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    program = tmp_path_factory.mktemp("list_work") / "list_work"
    source = Path(__file__).parent / "list_work.cu"
    subprocess.run(["nvcc", "-std=c++17", "-O1", "-o", str(program), str(source)], check=True)

    def run(passes):
        lines = "\n".join(map(str, passes))
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, items = line.split(";")
            numbers = map(int, items.split())
            yield [int(number) for number in sizes.split()], list(zip(*[numbers] * 5, strict=True))

    return run


@dataclass(frozen=True)
class Part:
    """A linear of a group."""

    cols: int
    depth: int
    r: int
    wants_a: bool
    wants_b: bool


@dataclass(frozen=True)
class Pass:
    M: int
    backward: bool
    drops: bool
    wants_out: bool
    gated: bool
    block_n: int
    clusters: int
    parts: tuple[Part, ...]
    summed: int

    def __str__(self):
        kind = (self.M, self.backward, self.drops, self.wants_out, self.gated)
        own = (*kind, self.block_n, self.clusters, len(self.parts), self.summed)
        numbers = own + sum((dataclasses.astuple(part) for part in self.parts), ())
        return " ".join(str(int(number)) for number in numbers)


def some_passes(count):
    rng = random.Random(0)
    for _ in range(count):
        backward, wants_out, gated = rng.random() < 0.7, rng.random() < 0.8, rng.random() < 0.3
        shared = rng.choice([1, 17, 64, 151, 512, 1001, 8191, 50257, rng.randint(1, 14400)])
        parts = []
        for i in range((1 if backward else 2) if gated else rng.choice([1, 1, 2, 3, 4])):
            own, r = (
                rng.choice([1, 136, 151, 512, 4096, 8191, 50257, rng.randint(1, 14400)]),
                rng.choice([0, 1, 16, 17, 64, 100, 128, *([] if gated else [129, 256])]),
            )
            own = parts[0].cols if gated and i else own
            wants = [backward and r > 0 and rng.random() < 0.8, backward and rng.random() < 0.8]
            parts.append(Part(*((shared, own) if backward else (own, shared)), r, *wants))
        wants_out = wants_out or gated or not backward or not any(part.wants_a or part.wants_b for part in parts)
        block_n = 256 if gated or max(part.r for part in parts) > 128 else rng.choice([128, 256])
        summed = len(parts)
        if backward and not gated and summed > 1 and rng.random() < 0.3:
            summed -= 1  # the last one's x is its own
            parts[-1] = dataclasses.replace(parts[-1], cols=rng.choice([1, 136, 5461]))
        M = rng.choice([1, 255, 256, 257, 2048, 2049, rng.randint(1, 40000)])
        drops, clusters = rng.random() < 0.5, rng.choice([1, 5, 57, 66])
        yield Pass(M, backward, drops, wants_out, gated, block_n, clusters, tuple(parts), summed)


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


def slice_firsts(row_pairs, groups, slices):
    """The first row pairs of groups, the longer ones first, or of their halves."""
    each, longer = divmod(row_pairs, groups)
    pairs = [each + (group < longer) for group in range(groups)]
    lengths = pairs if slices == groups else [half for n in pairs for half in (n - n // 2, n // 2)]
    return [0, *itertools.accumulate(lengths[:-1])]


def check(each, sizes, items):
    row_pairs, groups, slices, rides, ready, chains, most_chains, floats, most_floats, *of_parts = sizes
    assert row_pairs == -(-each.M // PAIR_ROWS)
    assert ready == 2 * row_pairs
    assert chains <= most_chains
    assert floats <= most_floats
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
        assert of_parts[3 * i] == (-(-part.cols // tile_cols) if has_tiles else 0)
        wanted |= set(itertools.product([i], range(row_pairs), range(of_parts[3 * i])))
    assert set(tiles) == wanted
    for (i, pair, col), number in tiles.items():
        waited_for = needed if each.backward or each.gated else [part for part in needed if part == i]
        assert all(low[part, pair] < number for part in waited_for) or (rides and col == 0)
    gradients = 0
    firsts = slice_firsts(row_pairs, groups, slices)
    ends = dict(zip(firsts, [*firsts[1:], row_pairs], strict=True))
    before = dict(zip(firsts[1:], firsts[:-1], strict=True))
    assert len(ends) == slices, "none is empty"
    for work, place, wants in ((GRADIENT_A, 1, "wants_a"), (GRADIENT_B, 2, "wants_b")):
        sums = places(items, lambda item, work=work: [item[1:4]] if item[0] == work else [])
        wanted = set()
        for i, part in enumerate(each.parts):
            assert (of_parts[3 * i + place] > 0) == getattr(part, wants)
            wanted |= set(itertools.product([i], firsts, range(of_parts[3 * i + place])))
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
    assert {bool(sizes[3]) for sizes, _ in listed} == {True, False}, "some ride and some do not"


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
