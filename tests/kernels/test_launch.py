"""Plans are made once per layout: what a compiled kernel depends on must be in their keys, and few are kept."""

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from triton import knobs
from triton.runtime import driver

from fused_lora.kernels import launch
from fused_lora.kernels.launch import Layout, record_launches
from fused_lora.kernels.tiles import KNOWN_GPUS
from fused_lora.recent import Recent
from tests.accuracy import assert_accurate
from tests.kernels.problem import DEVICE, RESULTS, Problem, gpus, randn

PATHS = [pytest.param(gpu, id=name) for name, gpu in gpus().items()]


@pytest.mark.interpreter
@pytest.mark.parametrize("gpu", PATHS)
def test_a_second_call_makes_no_plan(gpu):
    problem = Problem.random(96, 64, 72, 8, torch.float16)
    problem.kernels(gpu)
    made = list(launch._plans.young)
    problem.kernels(gpu)
    assert list(launch._plans.young) == made


@pytest.mark.interpreter
@pytest.mark.parametrize("gpu", PATHS)
def test_alignment_strides_and_dtypes_change_under_a_plan(gpu):
    """The same shapes, one after the other, each behind another pointer, stride or dtype."""
    shape = (96, 64, 72, 8)
    for change in (None, "x offset", "bias offset", "bias dtype", "weight stride", "lora dtype", None):
        problem = Problem.random(*shape, torch.float16, lora_dtype=torch.float32 if change == "lora dtype" else None)
        if change == "x offset":
            problem.x = torch.cat([problem.x.flatten()[:1], problem.x.flatten()])[1:].view(problem.x.shape)
        elif change == "bias offset":
            problem.bias = torch.cat([problem.bias[:1], problem.bias])[1:]
        elif change == "bias dtype":
            problem.bias = problem.bias.float()
        elif change == "weight stride":
            problem.weight = randn(72, 80, dtype=torch.float16, scale=0.125)[:, :64]
        got, exact = problem.kernels(gpu), problem.exact()
        if change == "bias dtype":
            problem.bias = problem.bias.half()
        unfused = problem.torch()
        for name in RESULTS:
            assert_accurate(f"{name} after {change}", got[name], exact[name], unfused[name])


def test_recorded_launches_do_not_run():
    with record_launches() as records:
        Problem.random(64, 64, 64, 8, torch.float16).kernels(KNOWN_GPUS["H100"])
    assert [plan.name for plan, _ in records][:2] == ["shrink_kernel", "expand_kernel"]


class Compiled:
    """What a launch asks of Triton's compiled kernel, and which way it went."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *args):
        self.launches.append(("straight", args))

    def __getitem__(self, grid):
        return lambda *args: self.launches.append(("with hooks", grid, args))


class Driver:
    @staticmethod
    def get_current_device():
        return 3

    @staticmethod
    def get_current_stream(device):
        return f"stream of {device}"


def test_a_compiled_kernel_is_launched_as_the_jit_does(monkeypatch):
    monkeypatch.setattr(driver, "_active", Driver)
    compiled = Compiled()
    launch.start(compiled, (7, 1, 1), ("x", 5))
    expected = (7, 1, 1, "stream of 3", "function", "metadata", None, None, None, "x", 5)
    assert compiled.launches == [("straight", expected)]


def test_a_profilers_hooks_are_called(monkeypatch):
    compiled = Compiled()
    for name in ("launch_enter_hook", "launch_exit_hook"):
        for hook in (print, knobs.HookChain()):
            with monkeypatch.context() as patch:
                patch.setattr(knobs.runtime, name, hook)
                if hook is not print:
                    hook.add(print)
                launch.start(compiled, (7, 1, 1), ("x", 5))
    assert compiled.launches == [("with hooks", (7, 1, 1), ("x", 5))] * 4


def test_overlapping_rows_are_not_for_the_copy_engine():
    rows = torch.zeros(64, dtype=torch.float16, device=DEVICE).expand(8, 64)
    assert not Layout.of(rows).tma_ready(KNOWN_GPUS["H100"])


def test_what_is_used_is_kept_and_no_more_than_so_much():
    recent, made = Recent(8), []
    for i in range(100):
        assert recent.get("often", lambda: made.append("often") or "kept") == "kept"
        assert recent.get(i, lambda i=i: made.append(i) or -i - 1) == -i - 1
        assert len(recent.young) + len(recent.old) <= 8
    assert made.count("often") == 1
    assert [recent.get(i, lambda: "new") for i in (98, 99, 0)] == [-99, -100, "new"]


def test_what_is_made_may_look_up_others():
    recent = Recent(4)
    assert recent.get("outer", lambda: recent.get("inner", lambda: 1) + 1) == 2
    assert recent.get("inner", lambda: 3) == 1


def test_threads_share_what_is_kept():
    recent = Recent(16)

    def look_up(seed):
        return [recent.get(i, lambda i=i: [i]) == [i] for i in ((seed + step * step) % 40 for step in range(3000))]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            assert all(all(right) for right in threads.map(look_up, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert len(recent.young) + len(recent.old) <= 16


def caches():
    """Entries of every functools cache of the package, by name."""
    functions = {
        f"{function.__module__}.{function.__qualname__}": function
        for name, module in list(sys.modules.items())
        if name.startswith("fused_lora")
        for function in vars(module).values()
        if hasattr(function, "cache_info")
    }
    return {name: function.cache_info().currsize for name, function in functions.items()}


@pytest.mark.parametrize("gpu", [KNOWN_GPUS["H100"], KNOWN_GPUS["RTX 3090"]], ids=["tma", "pointer"])
def test_nothing_is_kept_for_every_number_of_tokens(gpu, monkeypatch):
    plans = Recent(100)
    for module in ("expand", "expand_grads", "factor_grads", "reduce_splits", "shrink"):
        monkeypatch.setattr(sys.modules[f"fused_lora.kernels.{module}"], "planned", plans.get)

    def call(M, p):
        with record_launches() as records:
            Problem.random(M, 64, 48, 8, torch.float16, p=p).kernels(gpu)
        return len(records)

    assert all(call(M, p) for M in (1, 600) for p in (0.0, 0.5))
    before = caches()
    for M in range(2, 150):
        call(M, 0.0)
        call(M, 0.5)
    assert caches() == before
    assert 50 < len(plans.young) + len(plans.old) <= 100


@pytest.mark.interpreter
@pytest.mark.parametrize("gpu", PATHS)
def test_a_plan_that_was_forgotten_is_made_anew(gpu, monkeypatch):
    problem = Problem.random(96, 64, 72, 8, torch.float16)
    first = problem.kernels(gpu)
    for half in ("young", "old"):
        monkeypatch.setattr(launch._plans, half, {})
    again = problem.kernels(gpu)
    assert all(torch.equal(first[name], again[name]) for name in RESULTS)
