import pytest
import torch

from fused_lora.segments import BOX, SLICE, Place, constants, make_plan, tables

from .divisions import DIVISIONS, places_of, tables_by_loops


@pytest.mark.parametrize("name", DIVISIONS)
def test_tables(name):
    division = DIVISIONS[name]
    of = constants(division.plan(), torch.device("cpu"))
    found = tables(division.plan(), of, division.ends(), division.M)
    expected = [
        torch.tensor(each, dtype=torch.int32).view(-1, w)
        for each, w in zip(tables_by_loops(division), (4, 4, 2), strict=True)
    ]
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == torch.int32
        assert torch.equal(got.reshape(want.shape), want)
    assert [len(found.blocks), len(found.rows)] == [len(division.plan().levels)] * 2


@pytest.mark.parametrize("name", DIVISIONS)
def test_boxes_of_low_are_as_many_as_memory_is_taken_for(name):
    """Two neighbouring blocks of a level have at most one window in common."""
    division = DIVISIONS[name]
    plan = division.plan()
    blocks, windows, _ = tables(plan, constants(plan, torch.device("cpu")), division.ends(), division.M)
    slices = plan.window // SLICE
    last = blocks[-1, -1]
    boxes = last[1] + -(-last[3] // slices) * plan.window // BOX
    levels, count, _ = blocks.shape
    assert boxes <= plan.window // BOX * (levels * (count - 1) + len(windows))


def test_every_division_of_one_plan_has_tables_of_one_size():
    plan = make_plan([[Place(0, 16)], [], [Place(16, 16)]])
    of = constants(plan, torch.device("cpu"))
    sizes = set()
    for ends in ([100, 200, 300], [0, 0, 300], [300, 300, 300], [0, 300, 300]):
        found = tables(plan, of, torch.tensor(ends, dtype=torch.int32), 300)
        sizes.add(tuple(each.shape for each in found))
    assert len(sizes) == 1


def test_ends_behind_the_last_row_are_the_last_row():
    plan = make_plan([[Place(0, 16)], [Place(64, 16)]])
    of = constants(plan, torch.device("cpu"))
    found = tables(plan, of, torch.tensor([200, 900], dtype=torch.int32), 300)
    for got, want in zip(found, tables(plan, of, torch.tensor([200, 300], dtype=torch.int32), 300), strict=True):
        assert torch.equal(got, want)


def test_windows_of_a_plan():
    places = [Place(16, 16), Place(0, 16), Place(64, 16), None, Place(80, 16), Place(16, 16)]
    plan = make_plan([[] if place is None else [place] for place in places])
    (level,) = plan.levels
    assert level.windows == ((0, 0, 1), (64, 2, 2), (64, 4, 4), (0, 5, 5))
    assert level.begins == (16, 0, 64, None, 144, 208)
    assert plan.ranks == 256


def test_levels_of_a_plan():
    plan = make_plan([[Place(0, 16)], [Place(0, 16), Place(64, 64)], [Place(16, 16), None, Place(64, 64)]])
    first, second, third = plan.levels
    assert (first.windows, first.begins) == (((0, 0, 2),), (0, 0, 16))
    assert (second.windows, second.begins) == (((64, 1, 1),), (None, 64, None))
    assert (third.windows, third.begins) == (((64, 2, 2),), (None, None, 128))
    assert plan.ranks == 192


@pytest.mark.parametrize("name", DIVISIONS)
def test_where_places_begin(name):
    division = DIVISIONS[name]
    places, _ = places_of(division.ranks)
    wanted = {places[adapter]: tuple(begins) for adapter, begins in division.begins().items()}
    assert division.plan().begins() == wanted
