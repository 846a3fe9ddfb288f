"""The floors, against values worked out by hand."""

import pytest

from bench.shapes import (
    FORWARD,
    FORWARD_BACKWARD,
    GPU_SHAPES,
    Shape,
    byte_floor,
    flop_floor,
    flops,
    least_bytes,
    memory_needed,
    shapes_for,
)

TINY = Shape(M=2, K=3, N=5, r=7)


@pytest.mark.parametrize(
    ("shape", "expected"),
    list(
        zip(
            GPU_SHAPES,
            (1.012, 1.094, 1.188, 1.030, 1.375, 1.006, 1.012, 1.023, 1.019, 1.012, 1.188, 1.029),
            strict=True,
        )
    ),
    ids=str,
)
def test_flop_floor_of_forward_and_backward(shape, expected):
    assert flop_floor(shape, FORWARD_BACKWARD) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_flop_floors_are_the_closed_formulas(shape):
    K, N, r = shape.K, shape.N, shape.r
    assert flop_floor(shape, FORWARD) == pytest.approx(1 + r / K + r / N)
    assert flop_floor(shape, FORWARD_BACKWARD) == pytest.approx(1 + 3 * r * (K + N) / (2 * K * N))


@pytest.mark.parametrize(
    ("pass_name", "work", "expected"),
    [
        # x W^T: 2 * 2 * 3 * 5. The update: 2 * 2 * 7 * (3 + 5).
        (FORWARD, "frozen", 60),
        (FORWARD, "full_rank", 60),
        (FORWARD, "lora", 60 + 224),
        (FORWARD_BACKWARD, "frozen", 120),
        (FORWARD_BACKWARD, "full_rank", 180),
        (FORWARD_BACKWARD, "lora", 120 + 3 * 224),
    ],
)
def test_flops(pass_name, work, expected):
    assert flops(TINY, pass_name, work) == expected


@pytest.mark.parametrize(
    ("pass_name", "work", "expected"),
    [
        # x 6, W 15, y 10; A and B 56.
        (FORWARD, "frozen", 31),
        (FORWARD, "lora", 31 + 56),
        (FORWARD_BACKWARD, "frozen", 62),
        (FORWARD_BACKWARD, "full_rank", 62 + 6 + 15),
        (FORWARD_BACKWARD, "lora", 62 + 6 + 3 * 56),
    ],
)
def test_least_bytes(pass_name, work, expected):
    assert least_bytes(TINY, pass_name, 2, work) == 2 * expected


def test_byte_floor_is_near_one_where_the_rank_is_small():
    assert byte_floor(GPU_SHAPES[5], FORWARD) == pytest.approx(1 + 16 * 16384 / (3 * 8192**2))


def test_the_largest_shape_fits_a_24_gib_card():
    assert max(memory_needed(shape, itemsize=2, variants=9) for shape in GPU_SHAPES) < 20 * 2**30


def test_quick_is_two_of_the_shapes():
    for device_type in ("cuda", "cpu"):
        assert len(shapes_for(device_type, quick=True)) == 2
        assert set(shapes_for(device_type, quick=True)) < set(shapes_for(device_type))


def test_parse():
    assert Shape.parse("2,3,5,7") == TINY
    for text in ("2,3,5", "2,3,5,0", "a,b,c,d"):
        with pytest.raises(ValueError, match=r"four positive integers|invalid literal"):
            Shape.parse(text)
