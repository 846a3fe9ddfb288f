"""explain(): what it says of a layer, of a shape, of a card it names, and what it refuses."""

import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, add_adapter, backends, choices, explain, explain_banks, replace_linear
from fused_lora.pretrain.llama import MLP, Attention, LlamaConfig
from tests.cards import CUDA

of_explain = importlib.import_module("fused_lora.explain")
SHAPE = dict(in_features=4096, out_features=1024, r=16)
CARDS = [
    "A100", "A100 40 GB", "A100 80 GB", "A6000", "RTX 6000 Ada", "RTX 3090", "RTX 4090", "L40S", "H200", "H100",
]  # fmt: skip
HOPPER = ("H100", "H200")


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.delenv("FUSED_LORA_BACKEND", raising=False)
    monkeypatch.setattr(backends, "interpreting", lambda: False)
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


@pytest.mark.parametrize("card", CARDS)
def test_a_card_by_name(card):
    pytest.importorskip("triton")
    told = explain(gpu=card, tokens=8192, **SHAPE)
    reason = f"explained for {card} without the CUDA extension"
    assert (told.backend, told.reason, told.device) == ("triton", reason, card)
    lines = str(told).splitlines()
    assert lines[0] == f"M=8192 tokens, K=4096 -> N=1024, r=16, torch.bfloat16 on {card}"
    assert lines[1] == f"backend: triton ({reason})"
    assert {"forward:", "backward:"} < set(lines)
    for name in ("shrink_kernel", "expand_kernel"):
        assert any(line.startswith(f"  {name} programs=") and "BLOCK_M=" in line for line in lines)
    grads = "expand_grads_kernel" if card in HOPPER else "factor_grads_kernel"
    assert grads in [name for name, _, _ in told.backward]
    assert ("TMA" in str(told)) == (card in HOPPER)


@pytest.mark.parametrize("card", CARDS)
def test_times_of_a_card(card):
    """Each launch has one; their sums and ratios are told, and what they rest on."""
    pytest.importorskip("triton")
    told = explain(gpu=card, tokens=8192, **SHAPE)
    launches, frozen = told.predicted.forward, told.predicted.frozen
    assert [launch.name for launch in launches] == [name for name, _, _ in told.forward]
    assert [launch.name for launch in told.predicted.backward] == [name for name, _, _ in told.backward]
    lines = str(told).splitlines()
    for launch in launches:
        assert any(line.startswith(f"  {launch.name} ") and line.endswith(f"({launch.us:.0f} us)") for line in lines)
    us, ratio = sum(launch.us for launch in launches), told.predicted.forward_ratio
    start = (
        f"predicted: forward {us:.0f} us, {ratio:.2f} of the frozen linear's {frozen[0].us:.0f}; forward + backward "
    )
    assert any(line.startswith(start) for line in lines)
    assert "predicted with the CUDA extension" in str(told)
    assert "predicted with torch's products (addmm)" in str(told)
    assert ("extrapolated" in str(told)) == (card not in HOPPER)
    assert ("checked on an" in str(told)) == (card in HOPPER)


@pytest.mark.parametrize("options", [dict(p=0.1), dict(dtype=torch.float32)], ids=str)
def test_what_has_no_predicted_times(options):
    pytest.importorskip("triton")
    told = explain(gpu="A100", **SHAPE, **options)
    assert told.predicted is None
    assert "predicted times: only of 16-bit products without dropout" in str(told).splitlines()


def test_the_launches_are_those_of_the_shape():
    """Programs times tile cover the output, and dropout and float32 change what runs."""
    pytest.importorskip("triton")

    def expand_of(part):
        return next((programs, meta) for name, programs, meta in part if name == "expand_kernel")

    programs, meta = expand_of(explain(gpu="RTX 3090", tokens=1000, **SHAPE).forward)
    assert programs == -(-1000 // meta["BLOCK_M"]) * -(-1024 // meta["BLOCK_N"])
    assert not meta["DROPOUT"]
    backward = explain(gpu="RTX 3090", tokens=1000, p=0.1, **SHAPE).backward
    assert expand_of(backward)[1]["DROPOUT"]
    assert "DROPOUT" in str(explain(gpu="H100", p=0.1, **SHAPE))
    assert "TMA" not in str(explain(gpu="H100", dtype=torch.float32, **SHAPE))


@pytest.mark.parametrize(("changes", "note"), [
    (dict(in_features=4092), "in_features=4092 is not a multiple of 8"),
    (dict(out_features=1020), "out_features=1020 is not a multiple of 8"),
    (dict(r=12), "r=12 is not a multiple of 8"),
    (dict(dtype=torch.float32), "float32 multiplies in IEEE"),
    (dict(lora_dtype=torch.float32), "A and B are torch.float32"),
])  # fmt: skip
def test_notes(changes, note):
    pytest.importorskip("triton")
    assert explain(gpu="H100", **SHAPE).notes == ()
    told = explain(gpu="H100", **SHAPE | changes)
    assert any(note in each for each in told.notes)
    assert f"note: {told.notes[0]}" in str(told)


def test_float32_is_explained_as_torch_would_multiply_it():
    pytest.importorskip("triton")
    before, options = torch.get_float32_matmul_precision(), dict(gpu="A100", dtype=torch.float32, **SHAPE)
    ieee = explain(**options)
    try:
        torch.set_float32_matmul_precision("high")
        tf32 = explain(**options)
    finally:
        torch.set_float32_matmul_precision(before)
    assert tf32.notes == ()
    assert {meta["PRECISION"] for _, _, meta in ieee.forward if "PRECISION" in meta} == {"ieee"}
    assert {meta["PRECISION"] for _, _, meta in tf32.forward if "PRECISION" in meta} == {"tf32"}


def test_a_layer_on_a_cpu():
    layer = LoRALinear(40, 30, 6, 9.0)
    told = explain(layer, tokens=100)
    assert (told.shape, told.dtype, told.device) == ((100, 40, 30, 6), torch.float32, "cpu")
    assert told.backend == "reference"
    assert told.reason in ("no kernel for device cpu", "triton is not installed")
    lines = ["M=100 tokens, K=40 -> N=30, r=6, torch.float32 on cpu", f"backend: reference ({told.reason})"]
    assert str(told).splitlines() == lines


def test_a_layer_for_a_card():
    pytest.importorskip("triton")
    dtypes = dict(dtype=torch.bfloat16, lora_dtype=torch.float32)
    layer = LoRALinear(4096, 1024, 16, 24.0, lora_dropout=0.1, device="meta", **dtypes)
    told = explain(layer, gpu="H100")
    assert str(told) == str(explain(gpu="H100", lora_dtype=torch.float32, p=0.1, **SHAPE))


def test_the_variable_is_explained(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_BACKEND", "reference")
    told = explain(LoRALinear(40, 30, 6, 9.0))
    assert (told.backend, told.reason) == ("reference", "FUSED_LORA_BACKEND=reference")


@pytest.mark.parametrize("missing", ["in_features", "out_features", "r"])
def test_a_shape_that_is_not_whole(missing):
    with pytest.raises(ValueError, match="explain needs a layer, or in_features, out_features and r"):
        explain(**{name: size for name, size in SHAPE.items() if name != missing})


def test_a_card_that_is_not_known():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=r"gpu must be one of A100, .*H100, got 'TPU'"):
        explain(gpu="TPU", **SHAPE)


@pytest.mark.parametrize(("r", "error"), [(0, ValueError), (513, ValueError), (True, TypeError)])
def test_a_bad_rank(r, error):
    with pytest.raises(error, match=r"^r must be"):
        explain(**SHAPE | {"r": r})


def test_a_card_has_no_kernel_for_float64():
    pytest.importorskip("triton")
    told = explain(gpu="H100", dtype=torch.float64, **SHAPE)
    assert (told.backend, told.reason) == ("reference", "no kernel for torch.float64")


@pytest.mark.parametrize("wrong", ["tokens", "in_features", "out_features"])
@pytest.mark.parametrize("size", [0, -3])
def test_a_size_that_is_none(wrong, size):
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match=f"{wrong} must"):
        explain(gpu="H100", **SHAPE | {wrong: size})


def test_a_card_without_triton():
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import fused_lora, fused_lora.backends as b\n"
        "b.has_triton = lambda: False\n"
        "fused_lora.explain(in_features=8, out_features=8, r=2, gpu='H100')\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stderr.strip().endswith("ModuleNotFoundError: explaining for a GPU needs triton installed")


def test_a_choice_is_a_guess_until_it_is_measured(card):
    card(86)
    told = explain(tokens=8000, device="cuda:0", **SHAPE)
    assert told.backend == "triton"
    assert told.reason.startswith("cuda tensor")
    assert told.reason.endswith(f"; {choices.GUESS}")
    masked = explain(tokens=8000, device="cuda:0", p=0.1, **SHAPE)
    assert (masked.backend, masked.reason) == ("triton", f"cuda tensor of torch.bfloat16; {choices.GUESS}")
    assert masked.forward
    key = choices.key_of(8192, 1024, 4096, 16, torch.bfloat16, 0.0)
    choices.remember(CUDA, key, {"triton": 130.0, "addmm": 100.0})
    told = explain(tokens=8000, device="cuda:0", **SHAPE)
    reason = "measured by fused_lora.tune: addmm 1.00, triton 1.30"
    assert (told.backend, told.reason) == ("addmm", reason)
    assert not told.forward
    assert str(told).splitlines()[1] == f"backend: addmm ({reason})"
    assert explain(tokens=8000, p=0.1, device="cuda:0", **SHAPE).backend == "triton"
    assert explain(tokens=9000, device="cuda:0", **SHAPE).backend == "triton"
    assert explain(tokens=8000, gpu="A6000", **SHAPE).reason == "explained for A6000 without the CUDA extension"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_this_machines_gpu(dtype):
    layer = LoRALinear(264, 136, 16, 24.0, device="cuda", dtype=dtype)
    told = explain(layer, tokens=300)
    chosen = backends.choose(layer.weight.device, dtype)
    assert (told.backend, told.device) == (chosen.name, "cuda:0")
    guess = f"; {choices.GUESS}" if choices.is_guess(layer.weight.device, chosen.name) else ""
    assert told.reason == chosen.reason + guess
    assert told.forward
    assert told.backward


def fused_block():
    model = nn.ModuleDict(
        {"mlp": MLP(LlamaConfig(16, 24, 1, 2, 40)), "attention": Attention(LlamaConfig(16, 24, 1, 2, 40))}
    )
    replace_linear(model, r=4, lora_alpha=1.0)
    return model


def test_what_was_measured_keeps_layers_apart(monkeypatch):
    """A group and an MLP that csrc would compute as one."""
    block = fused_block()
    monkeypatch.setattr(of_explain, "together", lambda layers, like: [layer.lora_part() for layer in layers])
    monkeypatch.setattr(type(block["mlp"]), "why_not", lambda mlp, like: None)
    asked = []

    def measured(rows, parts, p):
        asked.append((rows.shape[0], len(parts), p))
        return "measured elsewhere" if rows.shape[0] == 100 else None

    monkeypatch.setattr(of_explain, "measured_obstacle", measured)
    for tokens, how, fused in (
        (100, "one by one: measured elsewhere", "no: measured elsewhere"),
        (200, "in one launch", "act(gate) up is made"),
    ):
        layers = explain(block, tokens=tokens).layers
        assert layers["attention.k_proj"].notes[-1].endswith(f"computed {how}")
        assert layers["mlp"].fused.startswith(fused)
    assert asked == [(100, 3, 0.0)] * 2 + [(200, 3, 0.0)] * 2


def test_a_group_and_an_mlp_say_whether_they_are_computed_as_one():
    block = fused_block()
    layers = explain(block).layers
    notes = layers["attention.k_proj"].notes
    assert notes[-1].startswith(
        "one of 3 layers that are called with one x, computed one by one: no kernel for device cpu"
    )
    assert not any("together" in note for note in layers["attention.o_proj"].notes)
    told = explain(block["mlp"], tokens=100)
    assert [told.layers[name].shape for name in ("gate_proj", "up_proj", "down_proj")] == [
        (100, 16, 24, 4), (100, 16, 24, 4), (100, 24, 16, 4),
    ]  # fmt: skip
    assert told.fused.startswith("no: no kernel for device cpu")
    assert "gate_proj: M=100 tokens" in str(told)


def test_a_model_is_explained_layer_by_layer_and_alike_layers_once():
    blocks = [nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)) for _ in range(3)]
    model = nn.ModuleDict({"layers": nn.ModuleList(blocks), "last": nn.Linear(16, 8), "plain": nn.Linear(8, 8)})
    report = replace_linear(model, r=4, lora_alpha=1.0, exclude_modules=["plain"])
    told = explain(model, tokens=100)
    assert list(told.layers) == report.replaced
    assert all(told.layers[name] == explain(model.get_submodule(name), tokens=100) for name in report.replaced)
    titles = [text.splitlines()[0] for text in str(told).split("\n\n")]
    assert titles == ["layers.*.0 (3 layers)", "layers.*.2 (3 layers)", "last"]
    assert str(told).count("M=100 tokens, K=16 -> N=24, r=4") == 1


def test_an_mlp_of_banks_says_whether_it_is_computed_as_one(monkeypatch):
    """Whatever adapters rows have now."""
    model = nn.ModuleDict({"mlp": MLP(LlamaConfig(16, 24, 1, 2, 40))})
    add_adapter(model, "one", 8, 1.0)
    told = explain(model, tokens=100)
    assert list(told.layers) == ["mlp"]
    assert told.layers["mlp"].fused.startswith("no: no kernel for device cpu")
    assert [layer.shape for layer in told.layers["mlp"].layers.values()] == [
        (100, 16, 24, 8), (100, 16, 24, 8), (100, 24, 16, 8),
    ]  # fmt: skip
    monkeypatch.setattr(choices, "choose_segments", lambda *_: backends.Choice("cuda", ""))
    monkeypatch.setattr(choices, "gated_segments_obstacle", lambda device, window, drops: f"a window of {window}")
    assert explain_banks.apart(list(model["mlp"].children())) is None
    layers = list(model["mlp"].children())
    assert explain_banks.apart(layers, gated=True) == "a window of 64"
    layers[0].set_lora_dropout("one", 0.5)
    assert "others do not" in explain_banks.apart(layers)
    layers[0].set_lora_dropout("one", 0.0)
    layers[1].register_forward_hook(lambda *_: None)
    assert "runs by its own forward: it has hooks" in explain_banks.apart(layers)


def test_a_models_mlps_are_explained_as_one():
    block = fused_block()
    told = explain(nn.ModuleDict({"block": block}), tokens=100)
    assert {"block.attention.o_proj", "block.mlp"} <= set(told.layers)
    assert "block.mlp.up_proj" not in told.layers
    assert str(told.layers["block.mlp"]) == str(explain(block["mlp"], tokens=100))


def test_a_model_for_a_card():
    pytest.importorskip("triton")
    model = nn.Sequential(LoRALinear(4096, 1024, 16, device="meta", dtype=torch.bfloat16))
    assert "BLOCK_M" in str(explain(model, gpu="H100"))


def test_a_model_without_layers_is_refused():
    with pytest.raises(ValueError, match=r"^layer must be or hold a LoRALinear, got Sequential without one"):
        explain(nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.gpu
def test_a_group_and_an_mlp_are_computed_as_one_on_hopper():
    block = fused_block().to("cuda", torch.bfloat16)
    if explain(block["mlp"].gate_proj).backend != "cuda":
        pytest.skip("csrc's kernels do not run here")
    notes = explain(block).layers["attention.k_proj"].notes
    assert notes[-1] == "one of 3 layers that are called with one x, computed in one launch"
    assert explain(block["mlp"]).fused.startswith("act(gate) up is made")
