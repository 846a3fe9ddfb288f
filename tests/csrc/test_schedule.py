"""The list of work of csrc's kernels, made on the CPU: all work once, and every item after those it waits for."""

import itertools
import random
import shutil
import subprocess
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
        lines = "\n".join(" ".join(map(str, each)) for each in passes)
        done = subprocess.run([str(program)], input=lines, capture_output=True, text=True, check=True)
        for line in done.stdout.splitlines():
            sizes, items = line.split(";")
            numbers = map(int, items.split())
            yield [int(number) for number in sizes.split()], list(zip(*[numbers] * 4, strict=True))

    return run


def some_passes(count):
    """M, N, K, r, backward, drops, wants_out, wants_dA, wants_dB, block_n, clusters."""
    rng = random.Random(0)
    for _ in range(count):
        M = rng.choice([1, 255, 256, 257, 2048, 2049, rng.randint(1, 40000)])
        N, K = (8 * rng.choice([1, 17, 64, 128, 512, rng.randint(1, 1800)]) for _ in range(2))
        backward = rng.random() < 0.7
        wants = [rng.random() < 0.8 for _ in range(3)] if backward else [True, False, False]
        wants = wants if any(wants) else [True, True, True]
        r = rng.choice([1, 16, 17, 64, 100, 128, 129, 256])
        block_n = 256 if r > 128 else rng.choice([128, 256])
        yield (M, N, K, r, int(backward), rng.randint(0, 1), *map(int, wants), block_n, rng.choice([1, 5, 57, 66]))


def places(items, pairs_of):
    """Item numbers by what they do: each key once."""
    found = {}
    for number, item in enumerate(items):
        for key in pairs_of(item):
            assert key not in found, f"{key} is in the list twice"
            found[key] = number
    return found


def shrunk(item):
    work, first, count, stride = item
    return [first + i * stride for i in range(count)] if work == SHRINK else []


def check(each, sizes, items):
    M, N, _, _, _, _, wants_out, wants_dA, wants_dB, block_n, _ = each
    row_pairs, tile_cols, dA_pairs, dB_pairs, slice_pairs, rides, ready, chains, most_chains, floats, most_floats = (
        sizes
    )
    assert row_pairs == -(-M // PAIR_ROWS)
    assert tile_cols == (-(-N // block_n) if wants_out else 0)
    assert ready == 2 * row_pairs
    assert chains <= most_chains
    assert floats <= most_floats
    slices = -(-row_pairs // slice_pairs)
    low = places(items, shrunk)
    tiles = places(items, lambda item: [item[1:3]] if item[0] == TILE else [])
    assert set(tiles) == set(itertools.product(range(row_pairs), range(tile_cols)))
    if rides:
        assert not low
        low = {pair: tiles[pair, 0] for pair in range(row_pairs)}
    assert set(low) == (set(range(row_pairs)) if wants_out or wants_dA else set())
    for (pair, col), number in tiles.items():
        assert low[pair] < number or (rides and col == 0)
    for work, cols in ((GRADIENT_A, dA_pairs), (GRADIENT_B, dB_pairs)):
        sums = places(items, lambda item, work=work: [item[1:3]] if item[0] == work else [])
        firsts = range(0, row_pairs, slice_pairs)
        assert set(sums) == set(itertools.product(firsts, range(cols)))
        for first, col in sums:
            assert first == 0 or sums[first - slice_pairs, col] < sums[first, col], "slices are chained in order"
            if work == GRADIENT_A:
                waited_for = range(first, min(first + slice_pairs, row_pairs))
                assert all(low[pair] < sums[first, col] for pair in waited_for)
    assert (dA_pairs > 0, dB_pairs > 0) == (bool(wants_dA), bool(wants_dB))
    count = len(set(low.values())) * (not rides) + len(tiles) + slices * (dA_pairs + dB_pairs)
    assert len(items) == count


def test_all_work_once_and_in_an_order_that_can_finish(list_work):
    passes = list(some_passes(400))
    listed = list(list_work(passes))
    assert len(listed) == len(passes)
    for each, (sizes, items) in zip(passes, listed, strict=True):
        check(each, sizes, items)
    assert {bool(sizes[5]) for sizes, _ in listed} == {True, False}, "some ride and some do not"


def test_the_check_can_fail(list_work):
    each = (6000, 512, 512, 16, 1, 0, 1, 1, 1, 256, 66)
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
