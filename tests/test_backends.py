"""Which backend runs a call: the variables, the reasons, tiles for every GPU, and that importing asks nothing."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fused_lora import backends, choices, lora_linear
from tests.cards import CUDA, forget, pretend_extension

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    """No variable set, nothing remembered from another test, no interpreter."""
    for name in ("FUSED_LORA_BACKEND", "FUSED_LORA_AUTOTUNE", "FUSED_LORA_CACHE_DIR", "FUSED_LORA_AS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: "not built")
    forget()
    yield
    forget()


@pytest.fixture
def extension(monkeypatch):
    pretend_extension(monkeypatch)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: None)


def test_forcing(monkeypatch):
    assert backends.forced_backend() is None
    for value, forced in (("auto", None), ("cuda", "cuda"), ("addmm", "addmm"), ("reference", "reference")):
        monkeypatch.setenv("FUSED_LORA_BACKEND", value)
        assert backends.forced_backend() == forced


@pytest.mark.parametrize("value", ["", "Triton", "csrc", "0"])
def test_a_wrong_backend_is_refused_with_the_right_ones(value, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_BACKEND", value)
    with pytest.raises(
        ValueError, match=f"FUSED_LORA_BACKEND must be one of auto, .*triton, addmm, reference, got '{value}'"
    ):
        lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))


def test_the_variable_is_read_at_each_call(monkeypatch):
    assert backends.choose(CPU, torch.float32).reason != "FUSED_LORA_BACKEND=reference"
    monkeypatch.setenv("FUSED_LORA_BACKEND", "reference")
    assert backends.choose(CPU, torch.float32) == backends.Choice("reference", "FUSED_LORA_BACKEND=reference")


@pytest.mark.parametrize(("value", "enabled"), [(None, False), ("0", False), ("1", True)])
def test_autotuning(value, enabled, monkeypatch):
    if value is not None:
        monkeypatch.setenv("FUSED_LORA_AUTOTUNE", value)
    assert backends.autotune_enabled() is enabled
    monkeypatch.setenv("FUSED_LORA_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FUSED_LORA_AUTOTUNE must be 0 or 1, got 'yes'"):
        backends.autotune_enabled()


@pytest.mark.parametrize(("value", "capability"), [(None, None), ("", None), ("sm80", 80), ("sm86", 86)])
def test_a_card_that_is_played(value, capability, monkeypatch):
    if value is not None:
        monkeypatch.setenv("FUSED_LORA_AS", value)
    assert backends.played_capability() == capability
    monkeypatch.setenv("FUSED_LORA_AS", "sm75")
    with pytest.raises(ValueError, match="FUSED_LORA_AS must be one of sm80, sm86, got 'sm75'"):
        backends.played_capability()


def test_a_cpu_runs_the_reference_and_says_why():
    pytest.importorskip("triton")
    assert backends.choose(CPU, torch.float32) == backends.Choice("reference", "no kernel for device cpu")


def test_without_triton(monkeypatch):
    monkeypatch.setattr(backends, "has_triton", lambda: False)
    assert backends.choose(CUDA, torch.bfloat16) == backends.Choice("reference", "triton is not installed")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("capability", [80, 86, 87, 89, 90, 100, 103, 110, 120, 121])
def test_a_gpu_runs_triton(capability, dtype, card):
    card(capability)
    assert backends.choose(CUDA, dtype) == backends.Choice("triton", f"cuda tensor of {dtype}")


UNREAD = "weight is quantised, its columns are not adjacent or more than 2^22, or A and B have dtypes of their own"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_hopper_runs_csrc_where_it_is_built(dtype, card, extension):
    card(90)
    assert backends.choose(CUDA, dtype) == backends.Choice("cuda", f"cuda tensor of {dtype}")
    assert backends.choose_lora_linear(CUDA, dtype, 8).name == "cuda"
    for r, readable, reason in (
        (300, True, "r is above 256"),
        (8, False, UNREAD),
    ):
        choice = backends.choose_lora_linear(CUDA, dtype, r, readable)
        assert choice == backends.Choice("triton", f"csrc's kernels do not take it: {reason}")


def test_what_csrc_reads():
    def reads(weight, A_dtype=torch.float16, B_dtype=torch.float16):
        return choices.csrc_reads(weight, torch.empty(2, 16, dtype=A_dtype), torch.empty(8, 2, dtype=B_dtype))

    weight = torch.empty(8, 24, dtype=torch.float16)
    assert reads(weight)
    assert reads(weight[:, :16])
    assert reads(weight, torch.float32, torch.float32)
    assert reads(weight[:, 1:17])
    assert reads(torch.empty(8, 21, dtype=torch.float16))
    assert not reads(weight.T)
    assert reads(torch.empty(8, 2**22, dtype=torch.float16, device="meta"))
    assert not reads(torch.empty(8, 2**22 + 8, dtype=torch.float16, device="meta"))
    assert not reads(torch.empty(2**22 + 8, 8, dtype=torch.float16, device="meta"))
    assert not reads(weight, torch.float32)
    assert not reads(weight, torch.bfloat16, torch.bfloat16)


def test_what_neither_csrc_nor_triton_takes_runs_the_reference(card, extension, monkeypatch):
    card(90)
    monkeypatch.setattr(backends, "host_compiler", lambda: None)
    choice = backends.choose_lora_linear(CUDA, torch.float16, 300)
    assert choice.name == "reference"
    assert "r is above 256" in choice.reason
    assert "no C compiler" in choice.reason


@pytest.mark.parametrize(("forced", "compiler", "name"), [
    ("auto", "/usr/bin/cc", "triton"), ("auto", None, "cuda"), ("cuda", "/usr/bin/cc", "cuda"),
    ("triton", "/usr/bin/cc", "triton"), ("reference", "/usr/bin/cc", "reference"),
])  # fmt: skip
def test_merges(forced, compiler, name, card, extension, monkeypatch):
    card(90)
    monkeypatch.setattr(backends, "host_compiler", lambda: compiler)
    monkeypatch.setenv("FUSED_LORA_BACKEND", forced)
    assert backends.choose_merge(CUDA, torch.float32).name == name


@pytest.mark.parametrize(("capability", "dtype", "name"), [
    (80, torch.float16, "cuda"), (86, torch.bfloat16, "cuda"), (89, torch.float16, "cuda"), (90, torch.float16, "cuda"),
    (90, torch.float32, "triton"), (80, torch.float32, "triton"), (100, torch.float16, "triton"),
    (120, torch.bfloat16, "triton"),
])  # fmt: skip
def test_whom_csrc_is_for(capability, dtype, name, card, extension):
    card(capability)
    assert backends.choose_lora_linear(CUDA, dtype, 8).name == name


def test_forcing_csrc_where_it_cannot_run_raises_the_reason(card, extension, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_BACKEND", "cuda")
    card(90)
    assert backends.choose_lora_linear(CUDA, torch.bfloat16, 8).name == "cuda"
    for arguments, reason in (
        ((CUDA, torch.bfloat16, 300), "r is above 256"),
        ((CUDA, torch.float32, 8), "no kernel for torch.float32"),
        ((CPU, torch.bfloat16, 8), "no kernel for device cpu"),
    ):
        with pytest.raises(NotImplementedError, match=f"=cuda cannot run this call: {reason}"):
            backends.choose_lora_linear(*arguments)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: "not built")
    forget()
    with pytest.raises(NotImplementedError, match="not built"):
        backends.choose(CUDA, torch.bfloat16)


@pytest.mark.parametrize("capability", [70, 75])
def test_an_old_gpu_runs_the_reference(capability, card):
    card(capability)
    reason = f"compute capability {capability / 10} is below 8.0"
    assert backends.choose(CUDA, torch.float16) == backends.Choice("reference", reason)


def test_float64_runs_the_reference(card):
    card(90)
    assert backends.choose(CUDA, torch.float64) == backends.Choice("reference", "no kernel for torch.float64")


def test_without_a_compiler_for_the_launchers(card, monkeypatch):
    card(90)
    monkeypatch.setattr(backends, "host_compiler", lambda: None)
    choice = backends.choose(CUDA, torch.float16)
    assert choice.name == "reference"
    assert "no C compiler" in choice.reason


def test_rocm_runs_the_reference(card, monkeypatch):
    card(90)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert backends.choose(CUDA, torch.float16).name == "reference"


def test_forcing_triton_where_it_cannot_run_raises_the_reason(monkeypatch, card):
    monkeypatch.setenv("FUSED_LORA_BACKEND", "triton")
    with pytest.raises(NotImplementedError, match="=triton cannot run this call: no kernel for device cpu"):
        lora_linear(torch.ones(1, 2), torch.ones(3, 2), torch.ones(1, 2), torch.ones(3, 1))
    card(75)
    with pytest.raises(NotImplementedError, match=r"compute capability 7\.5"):
        backends.choose(CUDA, torch.float16)
    card(80)
    forget()
    assert backends.choose(CUDA, torch.float16) == backends.Choice("triton", "FUSED_LORA_BACKEND=triton")


def test_a_host_compiler_is_looked_for(monkeypatch, tmp_path):
    backends.host_compiler.cache_clear()
    compiler = tmp_path / "gcc"
    compiler.write_text("")
    compiler.chmod(0o755)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends.host_compiler() == str(compiler)
    backends.host_compiler.cache_clear()
    monkeypatch.setenv("PATH", "")
    assert backends.host_compiler() is None
    backends.host_compiler.cache_clear()
    monkeypatch.setenv("CC", str(compiler))
    assert backends.host_compiler() == str(compiler)
    backends.host_compiler.cache_clear()


def test_the_gpus_view(card):
    card(86)
    gpu = backends.gpu(CUDA)
    assert (gpu.capability, gpu.sm_count, gpu.shared_memory) == (86, 80, 101376)


@pytest.mark.parametrize(("value", "shared_memory"), [("sm80", 166912), ("sm86", 101376)])
def test_hopper_plays_an_older_card(value, shared_memory, card, monkeypatch):
    """With its own number of SMs, and files of its own."""
    monkeypatch.setenv("FUSED_LORA_AS", value)
    card(90, shared_memory=232448)
    gpu = backends.gpu(CUDA)
    assert (gpu.capability, gpu.sm_count, gpu.shared_memory) == (int(value[2:]), 80, shared_memory)
    assert backends.card_name(CUDA) == f"Card 90 as {value}"
    assert f"tiles-Card-90-as-{value}-torch" in backends.cache_file("tiles", CUDA)
    assert backends.choose(CUDA, torch.float16).name == "triton"


def test_no_other_card_plays(card, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_AS", "sm80")
    card(86)
    gpu = backends.gpu(CUDA)
    assert (gpu.capability, gpu.shared_memory, backends.card_name(CUDA)) == (86, 101376, "Card 86")


def test_precision_follows_torchs_matmul_setting():
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert backends.precision(torch.float32) == precision
            assert backends.precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)


# Bytes of shared memory a block may have: what each capability reports, and the least of all for every one.
SHARED = {80: 166912, 87: 166912, 90: 232448, 100: 232448, 101: 232448, 103: 232448, 110: 232448}


@pytest.mark.parametrize("capability", range(80, 122))
def test_every_capability_gets_legal_tiles(capability):
    pytest.importorskip("triton")
    from fused_lora.kernels import tiles

    for shared_memory, sm_count in itertools.product({101376, SHARED.get(capability, 101376)}, (16, 132)):
        gpu = tiles.Gpu(capability, sm_count, shared_memory)
        for itemsize, precision in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
            for tma in {False, gpu.has_tma and itemsize == 2}:
                chosen = [tiles.expand_tile(M, 4096, gpu, itemsize, tma, precision) for M in (1, 100, 8192, 10**6)]
                assert tiles.expand_candidates(gpu, itemsize, tma, precision)
                assert all(tiles.legal(tile, gpu, itemsize, tma) for tile in chosen)
            for r in (1, 16, 17, 100, 256, 512):
                for tile in (
                    tiles.shrink_tile(r, gpu, itemsize, precision),
                    tiles.factor_grad_tile(r, gpu, itemsize, precision),
                    tiles.merge_tile(r, gpu, itemsize),
                ):
                    assert tiles.legal(tile, gpu, itemsize, False), (itemsize, precision, r, tile)


@pytest.mark.parametrize("capability", [87, 103, 120])
def test_an_unknown_gpu_plans_a_layer(capability):
    """No name is looked up: the launches follow from the numbers."""
    pytest.importorskip("triton")
    from fused_lora.explain import _record
    from fused_lora.kernels.tiles import Gpu

    x, dtype = torch.empty(300, 264, device="meta", dtype=torch.bfloat16), torch.bfloat16
    weight, A, B = (torch.empty(*shape, device="meta", dtype=dtype) for shape in ((136, 264), (16, 264), (136, 16)))
    forward, backward = _record(x, weight, A, B, None, 0.0, Gpu(capability, 48, 101376))
    assert [name for name, _, _ in forward if "split" not in name] == ["shrink_kernel", "expand_kernel"]
    assert backward


IMPORT = """
import os, sys, torch
before = set(sys.modules)
read = []
class Spy(type(os.environ)):
    def __getitem__(self, key):
        read.append(key)
        return super().__getitem__(key)
os.environ.__class__ = Spy
def refuse(*args, **kwargs):
    raise SystemExit("a GPU was asked for at import")
for name in ("is_available", "device_count", "get_device_properties", "get_device_capability", "get_device_name",
             "current_device", "_lazy_init", "init"):
    setattr(torch.cuda, name, refuse)
torch.compile = refuse
import fused_lora
new = set(sys.modules) - before
assert not torch.cuda.is_initialized()
assert not [name for name in sys.modules if name.partition(".")[0] == "triton"], "triton was imported"
assert not [name for name in new if name.startswith("fused_lora.kernels")], "kernels were imported"
assert not {"peft", "transformers", "numpy.testing", "matplotlib"} & {name.partition(".")[0] for name in new}
assert not [key for key in read if key.startswith(("FUSED_LORA", "TRITON", "CC", "CUDA", "PATH"))], read
print("quiet", len(new))
"""


def test_importing_asks_nothing_and_writes_nothing(tmp_path):
    """No triton, no variable, no GPU, no compile; no file where files are kept."""
    kept = "HOME", "TMPDIR", "XDG_CACHE_HOME", "TRITON_HOME", "TORCHINDUCTOR_CACHE_DIR"
    where = {"env": os.environ | dict.fromkeys(kept, str(tmp_path)), "cwd": tmp_path}
    command = [sys.executable, "-W", "error", "-c", IMPORT]
    result = subprocess.run(command, **where, capture_output=True, text=True, check=False)
    assert result.stdout.startswith("quiet"), result.stdout + result.stderr
    assert result.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_importing_without_triton():
    """And everything that a CPU does works."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fused_lora\n"
        "layer = fused_lora.LoRALinear(8, 6, 2, 3.0)\n"
        "layer(torch.randn(4, 8)).sum().backward()\n"
        "layer.merge_()\n"
        "print(fused_lora.explain(layer).reason)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
