"""Which backend follows from what fused_lora.tune has measured: by bucket, where it can run, never against a name."""

import json
from pathlib import Path

import pytest
import torch

from fused_lora import backends, choices
from fused_lora.backends import Choice
from fused_lora.measured_file import MeasuredFile
from fused_lora.ops import eager
from fused_lora.ops.lora_parts import measured_obstacle
from fused_lora.ops.parts import Part, flatten
from tests.cards import CUDA, forget, pretend_extension

BF16, SIZES, R = torch.bfloat16, (8192, 4096, 2048), 16  # M, N, K
DEFAULT = Choice("triton", "cuda tensor of torch.bfloat16")
TIMES = {"cuda": 100.0, "addmm": 112.0, "triton": 150.0}


def remember(times, sizes=SIZES, r=R, dtype=BF16, p=0.0):
    choices.remember(CUDA, choices.key_of(*sizes, r, dtype, p), times)


def choose(sizes=SIZES, r=R, dtype=BF16, p=0.0, readable=True):
    return choices.choose_lora_linear(CUDA, dtype, r, readable, *sizes, p)


@pytest.fixture
def extension(monkeypatch):
    return pretend_extension(monkeypatch)


@pytest.fixture
def hopper(card, extension, monkeypatch):
    card(90)
    monkeypatch.setattr(backends, "extension_obstacle", lambda: None)


def test_the_fastest_is_chosen_and_says_by_how_much(card):
    card(86)
    assert choose() == DEFAULT
    remember({"triton": 150.0, "addmm": 120.0})
    assert choose() == Choice("addmm", "measured by fused_lora.tune: addmm 1.00, triton 1.25")
    remember({"triton": 90.0, "addmm": 120.0})
    assert choose() == Choice("triton", "measured by fused_lora.tune: triton 1.00, addmm 1.33")


def test_tokens_count_by_powers_of_two_and_all_else_exactly(card):
    card(86)
    remember({"triton": 2.0, "addmm": 1.0})
    assert choose((4097, *SIZES[1:])).name == "addmm"
    for other in (
        choose((4096, *SIZES[1:])), choose((8193, *SIZES[1:])), choose((8192, 4096, 2049)), choose((8192, 4095, 2048)),
        choose(r=8), choose(dtype=torch.float16),
    ):  # fmt: skip
        assert other.name == "triton"
        assert "measured" not in other.reason
    remember({"triton": 1.0, "addmm": 9.0}, p=0.1)
    assert (choose(p=0.05).name, choose(p=0).name) == ("triton", "addmm")


def test_float32_is_measured_for_each_precision(card):
    card(86)
    remember({"triton": 2.0, "addmm": 1.0}, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    assert choose(dtype=torch.float32).name == "addmm"
    try:
        torch.set_float32_matmul_precision("high")
        assert choose(dtype=torch.float32).name == "triton"
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_later_process_remembers_and_reads_once(card, monkeypatch):
    card(86)
    remember({"triton": 2.0, "addmm": 1.0})
    forget()
    reads = []
    read = MeasuredFile._read
    monkeypatch.setattr(MeasuredFile, "_read", lambda self: reads.append(1) or read(self))
    assert [choose().name for _ in range(3)] == ["addmm"] * 3
    assert choose(r=8).name == "triton"
    assert reads == [1]
    card(89)
    assert choose().name == "triton", "it was measured on another card"


def test_nothing_measured_costs_no_key(card, monkeypatch):
    card(86)
    monkeypatch.setattr(choices, "key_of", None)
    assert choose() == DEFAULT


def test_hopper_follows_too(hopper):
    assert choose() == Choice("cuda", "cuda tensor of torch.bfloat16")
    remember(TIMES)
    assert choose() == Choice("cuda", "measured by fused_lora.tune: cuda 1.00, addmm 1.12, triton 1.50")
    remember(TIMES | {"addmm": 90.0})
    assert choose().name == "addmm"


def test_what_cannot_run_is_not_chosen(hopper, monkeypatch):
    remember(TIMES)
    without_csrc = Choice("addmm", "measured by fused_lora.tune: addmm 1.00, triton 1.34")
    assert choose(readable=False) == without_csrc
    monkeypatch.setattr(backends, "extension_obstacle", lambda: "not built")
    for function in (backends._choose, backends._choose_lora_linear, choices._choose):
        function.cache_clear()
    assert choose() == without_csrc


def test_what_could_not_be_measured_then_is_not_overruled(hopper):
    """The extension was built since."""
    remember({"addmm": 1.0, "triton": 2.0})
    assert choose() == Choice("cuda", "cuda tensor of torch.bfloat16")


def test_what_was_tried_and_did_not_run_is_not_chosen(card):
    card(120)
    remember({"triton": None, "addmm": 5.0})
    assert choose() == Choice("addmm", "measured by fused_lora.tune: addmm 1.00")
    remember({"triton": 5.0, "addmm": None})
    assert choose().name == "triton"


@pytest.mark.parametrize("forced", ["triton", "addmm", "reference"])
def test_a_name_is_obeyed(forced, card, monkeypatch):
    card(86)
    remember({"triton": 2.0, "addmm": 1.0})
    monkeypatch.setenv("FUSED_LORA_BACKEND", forced)
    assert choose() == Choice(forced, f"FUSED_LORA_BACKEND={forced}")


def test_a_cpu_asks_nothing(card, monkeypatch):
    card(86)
    remember({"triton": 2.0, "addmm": 1.0})
    cpu = torch.device("cpu")
    assert choices.choose_lora_linear(cpu, BF16, R, True, *SIZES, 0.0) == backends.choose_lora_linear(cpu, BF16, R)


@pytest.mark.parametrize(
    "entry",
    [None, 3, [], "addmm", {"triton": "2", "addmm": 1}, {"triton": 2, "addmm": float("nan")}, {"triton": 2, "addmm": 0},
     {"triton": 2, "addmm": -1.0}, {"triton": 2, "addmm": True}, {"triton": 2, "addmm": float("inf")}],
    ids=str,
)  # fmt: skip
def test_an_entry_that_makes_no_sense_is_none(entry, card):
    card(86)
    path = Path(backends.cache_file("backends", CUDA))
    path.parent.mkdir()
    path.write_text(json.dumps({choices.key_of(*SIZES, R, BF16, 0.0): entry}))
    assert choose() == DEFAULT


@pytest.mark.parametrize("name", ["cublas", "reference "])
def test_a_backend_that_is_none_is_not_chosen(name, card):
    card(86)
    remember({"triton": 2.0, "addmm": 3.0, name: 1.0})
    assert choose().name == "triton"


def test_a_damaged_file_is_told_and_computing_goes_on(card):
    card(86)
    path = Path(backends.cache_file("backends", CUDA))
    path.parent.mkdir()
    path.write_text("{")
    with pytest.warns(RuntimeWarning, match="backends-Card-86-.*is damaged"):
        assert choose() == DEFAULT
    remember({"triton": 2.0, "addmm": 1.0})
    forget()
    assert choose().name == "addmm"


def test_a_file_that_cannot_be_written_is_told_and_this_process_remembers(card, tmp_path):
    card(86)
    (tmp_path / "cache").write_text("no folder")
    with pytest.warns(RuntimeWarning, match="cannot be (read|written)"):
        remember({"triton": 2.0, "addmm": 1.0})
    assert choose().name == "addmm"
    assert not choices.measured(CUDA).writable


def test_a_guess_is_said_to_be_one(card, extension, monkeypatch):
    explained = lambda: choices.explained(CUDA, BF16, R, True, *SIZES, p=0.0).reason  # noqa: E731
    card(86)
    guess = "a guess for this card: python -m fused_lora.tune measures it"
    assert explained() == f"{DEFAULT.reason}; {guess}"
    remember({"triton": 2.0, "addmm": 3.0})
    assert explained() == "measured by fused_lora.tune: triton 1.00, addmm 1.50"
    monkeypatch.setenv("FUSED_LORA_BACKEND", "triton")
    assert explained() == "FUSED_LORA_BACKEND=triton"
    monkeypatch.delenv("FUSED_LORA_BACKEND")
    card(90)
    assert explained() == f"cuda tensor of torch.bfloat16; {guess}"
    monkeypatch.setattr(backends, "extension_obstacle", lambda: None)
    forget()
    assert explained() == "cuda tensor of torch.bfloat16"


class OnCuda:
    """As much of a CUDA tensor as is asked of x."""

    is_cuda, device, dtype = True, CUDA, BF16

    def __init__(self, *shape):
        self.shape = shape

    def dim(self):
        return len(self.shape)


def part(N, K, r=R):
    return Part(*(torch.empty(*shape, dtype=BF16, device="meta") for shape in ((N, K), (r, K), (N, r))))


def test_parts_are_one_launch_unless_one_is_faster_elsewhere(hopper):
    x, parts = OnCuda(4, 2048, 2048), [part(4096, 2048), part(1024, 2048), part(64, 2048, r=0)]
    assert measured_obstacle(x, parts, 0.0) is None
    remember(TIMES)
    assert measured_obstacle(x, parts, 0.0) is None
    remember({"cuda": 2.0, "addmm": 1.0}, (8192, 1024, 2048))
    assert measured_obstacle(x, parts, 0.0) == "measured by fused_lora.tune: addmm 1.00, cuda 2.00"
    assert measured_obstacle(x, parts[:1], 0.0) is None
    assert measured_obstacle(x, parts, 0.1) is None


class Extension:
    """csrc's eager functions."""

    def lora_linear(self, *arguments):
        return "linear"

    def lora_group(self, *arguments):
        return "group"

    def lora_mlp(self, *arguments):
        return "mlp"


def test_eager_calls_ask_first_where_something_was_measured(hopper, monkeypatch):
    built = Extension()
    monkeypatch.setattr(backends, "eager_extension", lambda: built)
    assert eager.csrc() is built
    remember({"cuda": 2.0, "addmm": 1.0}, (8192, 1024, 2048))
    slow, other, down = part(1024, 2048), part(4096, 2048), part(2048, 1024)
    x = OnCuda(8192, 2048)

    def ask(first, second):
        asked = eager.csrc()
        yield asked.lora_linear(x, *first[:3], None, None, None, 0.0, None)
        yield asked.lora_group(x, flatten([second, first]), None, 0.0)
        yield asked.lora_mlp(x, flatten([first, second, down]), None, 1, 0.0, [], False)

    assert list(ask(slow, other)) == [None] * 3
    assert list(ask(other, other)) == ["linear", "group", "mlp"]
    remember({"cuda": 2.0, "addmm": 1.0}, (8192, 2048, 1024))
    assert list(ask(other, other)) == ["linear", "group", None]


def test_what_is_no_call_is_left_to_csrc(hopper, monkeypatch):
    monkeypatch.setattr(backends, "eager_extension", Extension)
    remember({"cuda": 2.0, "addmm": 1.0})
    vector = torch.empty(3, device="meta", dtype=BF16)
    asked = eager.csrc()
    assert asked.lora_linear(OnCuda(8192, 2048), vector, vector, vector, None, None, None, 0.0, None) == "linear"
    assert asked.lora_linear(OnCuda(), *part(4096, 2048)[:3], None, None, None, 0.0, None) == "linear"
