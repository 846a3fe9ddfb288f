import json
import time
from dataclasses import astuple, replace
from pathlib import Path
from threading import Thread

import pytest
import torch
from torch import distributed, multiprocessing

from fused_lora import backends
from fused_lora.kernels import autotune, tiles
from fused_lora.kernels.launch import record_launches
from fused_lora.kernels.tiles import KNOWN_GPUS, Tile
from tests.accuracy import assert_accurate
from tests.kernels.problem import RESULTS, Problem

DEFAULT, FASTER = Tile(64, 64, 32, 4, 2), Tile(128, 64, 32, 4, 2)


class OnCuda:
    is_cuda, dtype = True, torch.bfloat16


def forget():
    """As in a new process."""
    autotune._choices.clear()
    autotune._file.cache_clear()


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    forget()
    return replace(KNOWN_GPUS["H100"], tile_cache=str(tmp_path / "folder" / "tiles.json"))


def tuned(gpu, runs, like=OnCuda):
    return autotune.tuned(gpu, "key", DEFAULT, [FASTER], runs.append, like, False)


def larger_is_faster(run, tile):
    run(tile)
    return -tile.block_m


def test_measures_once_and_remembers_on_disk(gpu, monkeypatch):
    monkeypatch.setattr(autotune, "_measure", larger_is_faster)
    runs = []
    assert tuned(gpu, runs) == FASTER
    assert tuned(gpu, runs) == FASTER
    assert runs == [DEFAULT, FASTER]
    forget()
    assert tuned(gpu, runs) == FASTER
    assert runs == [DEFAULT, FASTER]
    assert json.loads(Path(gpu.tile_cache).read_text()) == {"key": [128, 64, 32, 4, 2]}


@pytest.mark.parametrize("entry", [[8192, 64, 32, 4, 2], [100, 64, 32, 4, 2], [64, 64, 32, 0, 2], [64, 64], "a", None])
def test_an_entry_that_is_not_legal_is_measured_anew(entry, gpu, monkeypatch):
    monkeypatch.setattr(autotune, "_measure", larger_is_faster)
    Path(gpu.tile_cache).parent.mkdir()
    Path(gpu.tile_cache).write_text(json.dumps({"key": entry, "other": [64, 64, 32, 4, 3]}))
    runs = []
    assert tuned(gpu, runs, torch.empty(1, device="meta")) == DEFAULT
    assert tuned(gpu, runs) == FASTER
    assert runs == [DEFAULT, FASTER]
    forget()
    assert tuned(gpu, runs) == FASTER
    assert len(runs) == 2
    assert json.loads(Path(gpu.tile_cache).read_text())["other"] == [64, 64, 32, 4, 3]


@pytest.mark.parametrize(
    "tile", [Tile(64, 128, 64, 4, 2), Tile(128, 128, 64, 8, 7)], ids=["legal", "legal without tma"]
)
@pytest.mark.parametrize("name", ["H100", "A100"])
def test_kernels_say_what_is_legal_for_them(name, tile, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune.MeasuredFile, "get", lambda self, key: list(astuple(tile)))
    gpu = replace(KNOWN_GPUS[name], tile_cache=str(tmp_path / "tiles.json"))
    with record_launches() as records:
        Problem.random(256, 128, 256, 16, torch.bfloat16).kernels(gpu)
    metas = [plan.meta for plan, _ in records if plan.name.startswith("expand")]
    sizes = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    found = {Tile(*(meta[size] for size in sizes)) for meta in metas}
    assert len(metas) == 2
    assert (found == {tile}) == tiles.legal(tile, gpu, 2, gpu.has_tma)
    assert all(tiles.legal(each, gpu, 2, gpu.has_tma) for each in found)


@pytest.mark.parametrize("entry", [None, 1, {}, [], [64, 64, 32, 4], [64, 64, 32, 4, "2"], [64, 64, 32, 4, True]])
def test_an_entry_that_is_no_tile_is_none(entry):
    assert autotune._as_tile(entry) is None
    assert autotune._as_tile([64, 64, 32, 4, 2]) == DEFAULT


def test_threads_measure_once(gpu, monkeypatch):
    def slow(run, tile):
        time.sleep(0.05)
        return larger_is_faster(run, tile)

    monkeypatch.setattr(autotune, "_measure", slow)
    runs, found = [], []
    threads = [Thread(target=lambda: found.append(tuned(gpu, runs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FASTER] * 4
    assert runs == [DEFAULT, FASTER]


def choose_as_rank(rank, folder, results):
    """Each rank has a folder and a favourite of its own, and comes to a key that the other never sees."""
    forget()
    candidates = [DEFAULT, FASTER]
    autotune._measure = lambda run, tile: float(tile != candidates[rank])
    torch.cuda.is_current_stream_capturing = lambda: False
    gpu = replace(KNOWN_GPUS["H100"], tile_cache=f"{folder}/{rank}/tiles.json")
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    keys = [f"only {rank}", *(f"both {i}" for i in range(10))]
    chosen = {key: autotune.tuned(gpu, key, DEFAULT, [FASTER], print, OnCuda, False) for key in keys}
    forget()
    again = {key: autotune.tuned(gpu, key, DEFAULT, [FASTER], print, OnCuda, False) for key in keys}
    results.put((rank, candidates[rank], chosen, again))
    distributed.barrier()
    distributed.destroy_process_group()


def test_ranks_choose_alike_and_wait_for_nobody(tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=choose_as_rank, args=(rank, tmp_path, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    for rank, favourite, chosen, again in found:
        assert chosen[f"only {rank}"] == favourite
        assert chosen == again
        stored = json.loads((tmp_path / str(rank) / "tiles.json").read_text())
        assert {key: Tile(*entry) for key, entry in stored.items()} == chosen
    (_, _, one, _), (_, _, other, _) = found
    assert all(one[key] == other[key] for key in one if key.startswith("both"))


def test_a_store_that_does_not_answer_leaves_each_rank_its_choice(gpu, monkeypatch):
    monkeypatch.setattr(autotune, "_measure", larger_is_faster)
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", distributed.Store)
    assert tuned(gpu, []) == FASTER


def test_off_and_where_nothing_can_be_timed(gpu, monkeypatch):
    runs = []
    assert tuned(KNOWN_GPUS["H100"], runs) == DEFAULT
    assert tuned(gpu, runs, torch.empty(1, device="meta")) == DEFAULT
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuned(gpu, runs) == DEFAULT
    assert runs == []


@pytest.mark.gpu
def test_every_candidate_is_right(tmp_path):
    """Each tile on its own, over poisoned memory, then tuning itself."""
    device = torch.device("cuda", 0)
    plain = backends.gpu(device)
    problem = Problem.random(700, 520, 384, 16, torch.bfloat16)
    exact, unfused = problem.exact(), problem.torch()
    candidates = tiles.expand_candidates(plain, 2, plain.has_tma, "ieee")
    forget()
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
