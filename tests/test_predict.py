"""fused_lora.predict: what its launches add up to, how times grow, what it refuses. tests/bench checks the times."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from bench.shapes import FORWARD, FORWARD_BACKWARD, GPU_SHAPES, flops, least_bytes
from fused_lora.cards import CARDS
from fused_lora.predict import csrc, predict, words
from fused_lora.predict.products import heated, memory_time, product, thin, total
from fused_lora.predict.rates import AMPERE, HOPPER, rates_of
from fused_lora.predict.work import Work, makespan

KERNELS = ("csrc", "triton", "addmm", "frozen")
CARD = CARDS["H200"]


def both(*sizes, card=CARD, kernels="csrc"):
    """us of forward and backward."""
    found = predict(*sizes, card, kernels)
    return total(found.forward) + total(found.backward)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CARDS)
def test_launches_have_the_flops_and_at_least_the_bytes_of_the_linear(name, kernels):
    work = "frozen" if kernels == "frozen" else "lora"
    for shape in GPU_SHAPES:
        found = predict(shape.M, shape.K, shape.N, shape.r, CARDS[name], kernels)
        forward, backward = (sum(launch.flops for launch in launches) for launches in (found.forward, found.backward))
        assert (forward, forward + backward) == (flops(shape, FORWARD, work), flops(shape, FORWARD_BACKWARD, work))
        moved = sum(launch.bytes for launch in found.forward + found.backward)
        assert 1 <= moved / least_bytes(shape, FORWARD_BACKWARD, 2, work) < 5


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", CARDS)
def test_more_tokens_take_longer(name, kernels):
    times = [both(M, 4096, 2048, 64, card=CARDS[name], kernels=kernels) for M in range(1024, 32768, 1024)]
    # Waves are whole: a few more tokens may cost nothing, and where tiles become wider a little less.
    assert all(later > 0.94 * before for before, later in itertools.pairwise(times))
    assert times[-1] > 15 * times[0]


@pytest.mark.parametrize("kernels", ["csrc", "triton", "addmm"])
@pytest.mark.parametrize("name", CARDS)
def test_an_adapter_costs_more_than_its_flops_and_more_with_its_rank(name, kernels):
    ratios = [predict(16384, 2048, 2048, r, CARDS[name], kernels).ratio for r in (16, 64, 128)]
    assert ratios == sorted(ratios)
    # csrc's kernels fill what the frozen linear's last wave of tiles (256 x 128 at least) leaves idle.
    waves = 64 * 16 / CARDS[name].sm_count
    assert ratios[-1] > (1 + 3 * 128 / 2048) / (math.ceil(waves) / waves if kernels == "csrc" else 1)


def test_a_launch_takes_no_less_than_its_flops_and_bytes():
    for name, card in CARDS.items():
        for launch in (*(found := predict(8192, 4096, 4096, 16, card)).forward, *found.backward, *found.frozen):
            assert launch.us > launch.flops / (card.peak * card.tflops * 1e6), name
            assert launch.us > launch.bytes / (card.gigabytes * 1e3), name


def test_memory_sets_the_time_where_it_is_slow():
    slow = replace(CARD, gigabytes=100)
    launch = product("x W^T", 8192, 1024, 1024, slow, HOPPER.cublas, 0.0, 2)
    assert launch.us == HOPPER.cublas.launch + memory_time(slow, HOPPER.cublas, launch.bytes)
    assert (
        thin("x A^T", 8192, 4096, 16, slow, HOPPER.cublas, 2).us > thin("", 8192, 4096, 16, CARD, HOPPER.cublas, 2).us
    )


def test_a_small_cache_is_read_into_more_often():
    large = product("", 8192, 4096, 4096, replace(CARDS["A6000"], l2=200), AMPERE.cublas, 0.0, 2)
    assert large.bytes == 2 * (8192 * 4096 * 2 + 4096 * 4096)
    assert product("", 8192, 4096, 4096, CARDS["A6000"], AMPERE.cublas, 0.0, 2).bytes > 2 * large.bytes


def test_heat_comes_with_time():
    assert heated(100.0, 0.0, 0.0, 1000.0) == 100.0
    assert 100.0 < heated(100.0, 0.0, 0.2, 1000.0) < heated(100.0, 5000.0, 0.2, 1000.0) < 120.0


def test_the_last_worker_ends_it():
    assert makespan([3.0, 1.0, 1.0, 1.0, 2.0], 2) == 5.0
    assert makespan([], 4) == 0.0


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("long_tiles", [False, True])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (5, 3), (32, 16), (64, 4), (129, 8)])
def test_the_list_has_all_work_once(rows, cols, long_tiles, backward):
    gradient_cols = 7 if backward else 0
    work = Work(rows, cols, gradient_cols, 66, backward, long_tiles, long_tiles, 10.0, 0.0, 0.5, 0.25)
    assert sum(work.times()) == pytest.approx(rows * (cols * 10.0 + 0.5 + gradient_cols * 0.25))
    assert sum(group for group in work.groups()) == rows


def test_a_riding_tile_spares_the_shrink_items():
    riding = Work(8, 2, 0, 66, False, True, True, tile=10.0, riding=12.0, shrink=0.0, gradient=0.0)
    assert sorted(riding.times()) == [10.0] * 8 + [12.0] * 8


def test_ranks_are_padded_as_the_kernels_do():
    assert [csrc.block_rank(r) for r in (1, 16, 17, 64, 65, 128, 129, 256)] == [16, 16, 64, 64, 128, 128, 256, 256]


def test_ranks_that_csrc_does_not_take():
    with pytest.raises(ValueError, match="csrc's kernels take ranks up to 256, got r=257"):
        predict(512, 512, 512, 257, CARD)
    assert len(words.lines((512, 512, 512, 257), "H200", predict(512, 512, 512, 257, CARD, "triton"))) == 3
    assert len(words.lines((512, 512, 512, 256), "H200", predict(512, 512, 512, 256, CARD, "triton"))) == 4


def test_a_rank_that_is_no_multiple_of_8_costs_a_copy():
    (aligned,), (copied,) = (predict(8192, 4096, 4096, r, CARD).forward for r in (16, 12))
    assert copied.us > aligned.us


def test_kernels_that_are_not_known():
    with pytest.raises(ValueError, match="kernels must be one of csrc, triton, addmm, frozen, got 'cudnn'"):
        predict(1, 1, 1, 1, CARD, "cudnn")


@pytest.mark.parametrize("sizes", [(0, 8, 8, 2), (8, -1, 8, 2), (8, 8, 0, 2), (8, 8, 8, 0)])
def test_sizes_that_are_none(sizes):
    with pytest.raises(ValueError, match="M, K, N and r must be at least 1"):
        predict(*sizes, CARD)


def test_cards():
    assert CARDS["A100"] is CARDS["A100 80 GB"]
    assert {rates_of(card.capability) is HOPPER for card in CARDS.values() if card.capability < 90} == {False}
    assert words.trust("H200").startswith("checked on an H200")
    assert {words.trust(name)[:12] for name in CARDS if name[0] != "H"} == {"extrapolated"}


def test_nothing_but_python_is_needed():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "from fused_lora.cards import CARDS\nfrom fused_lora.predict import predict\n"
        "print(predict(8192, 4096, 4096, 16, CARDS['A100'], 'triton').ratio > 1)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"
