import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fused_lora import backends
from fused_lora.kernels import autotune, tiles
from fused_lora.kernels.tiles import KNOWN_GPUS, Tile
from tests.accuracy import assert_accurate
from tests.kernels.problem import RESULTS, Problem

DEFAULT, FASTER = Tile(64, 64, 32, 4, 2), Tile(128, 64, 32, 4, 2)


class OnCuda:
    is_cuda = True


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return replace(KNOWN_GPUS["H100"], tile_cache=str(tmp_path / "folder" / "tiles.json"))


def tuned(gpu, runs, like=OnCuda):
    return autotune.tuned(gpu, "key", DEFAULT, [FASTER], runs.append, like)


def test_measures_once_and_remembers_on_disk(gpu, monkeypatch):
    monkeypatch.setattr(autotune, "_measure", lambda run, tile: run(tile) or -tile.block_m)
    runs = []
    assert tuned(gpu, runs) == FASTER
    assert tuned(gpu, runs) == FASTER
    assert runs == [DEFAULT, FASTER]
    autotune._load.cache_clear()
    assert tuned(gpu, runs) == FASTER
    assert runs == [DEFAULT, FASTER]
    assert json.loads(Path(gpu.tile_cache).read_text()) == {"key": [128, 64, 32, 4, 2]}


def test_off_and_where_nothing_can_be_timed(gpu, monkeypatch):
    runs = []
    assert tuned(KNOWN_GPUS["H100"], runs) == DEFAULT
    assert tuned(gpu, runs, torch.empty(1, device="meta")) == DEFAULT
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(gpu, runs) == DEFAULT
    assert runs == []


def test_buckets_round_the_tokens_only():
    sizes = (512, 256, 16, torch.bfloat16)
    assert autotune.bucket("expand", 1000, *sizes, True) == autotune.bucket("expand", 1024, *sizes, True)
    assert autotune.bucket("expand", 1000, *sizes, True) != autotune.bucket("expand", 1025, *sizes, True)
    assert autotune.bucket("expand", 1000, *sizes, True) != autotune.bucket("expand", 1000, *sizes, False)


@pytest.mark.gpu
def test_every_candidate_is_right(tmp_path):
    """Each tile on its own, over poisoned memory, then tuning itself."""
    device = torch.device("cuda", 0)
    plain = backends.gpu(device)
    problem = Problem.random(700, 520, 384, 16, torch.bfloat16)
    exact, unfused = problem.exact(), problem.torch()
    candidates = tiles.expand_candidates(plain, 2, plain.has_tma, "ieee")
    for tile in candidates:
        forced = replace(plain, tile_cache=str(tmp_path / f"{tile.block_m}x{tile.block_n}.json"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(autotune, "_measure", lambda run, candidate, tile=tile: float(candidate != tile))
            torch.full((64 << 20,), float("nan"), device=device)
            got = problem.kernels(forced)
        for name in RESULTS:
            assert_accurate(f"{name} with {tile}", got[name], exact[name], unfused[name])
    measured = replace(plain, tile_cache=str(tmp_path / "tiles.json"))
    first, second = problem.kernels(measured), problem.kernels(measured)
    assert all(torch.equal(first[name], second[name]) for name in RESULTS)
