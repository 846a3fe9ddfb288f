"""accelerate's hooks, which bring weights in at each call: before a conversion and after it."""

import pytest
import torch

from fused_lora import explain, replace_linear
from fused_lora.modules import LoRALinear

pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

from tests.modules.language_model import FUSED, adapted, base, grads, tokens  # noqa: E402

# These libraries warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("default")

# A disk stands for a GPU's neighbours: what is there is brought in, and what is on the CPU stays.
DEVICES = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.norm": "disk", "lm_head": "cpu",
}  # fmt: skip


def offload(model, folder, **options):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), **options)


def dispatch(model, folder, **options):
    return accelerate.dispatch_model(model, DEVICES, main_device="cpu", offload_dir=str(folder), **options)


@pytest.fixture
def fused(groups, as_one):
    """What was computed together."""
    return lambda: sorted([*map(str, groups), *("mlp" for _ in as_one)])


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("way", [offload, dispatch])
def test_each_layer_by_itself(way, dora, fused, tmp_path):
    wanted = adapted(use_dora=dora)(tokens()).logits
    before = fused()
    model = way(adapted(use_dora=dora), tmp_path)
    for _ in range(2):
        torch.testing.assert_close(model(tokens()).logits, wanted)
    assert fused() == before
    assert "it has a forward of its own" in str(explain(model, tokens=18))


@pytest.mark.parametrize("way", [offload, dispatch])
def test_whole_blocks(way, fused, tmp_path):
    """Inside the block everything is at hand."""
    wanted = adapted()(tokens()).logits
    before = fused()
    model = way(adapted(), tmp_path, preload_module_classes=["LlamaDecoderLayer"])
    torch.testing.assert_close(model(tokens()).logits, wanted)
    hooked = 2 if way is offload else 1  # of two blocks; the other one's layers stay, with hooks of their own
    assert fused() == sorted(before + sorted(map(str, FUSED[:2])) * hooked)


def test_gradients_of_a_model_whose_blocks_are_placed():
    model = accelerate.dispatch_model(adapted(), {"": "cpu"}, main_device="cpu", force_hooks=True)
    torch.testing.assert_close(grads(model), grads(adapted()))


def test_it_can_be_undone(tmp_path):
    model = offload(adapted(), tmp_path)
    with pytest.raises(ValueError, match="weight must be in memory to be merged"):
        next(layer for layer in model.modules() if isinstance(layer, LoRALinear)).merge_()
    accelerate.hooks.remove_hook_from_submodules(model)
    torch.testing.assert_close(grads(model), grads(adapted()))


@pytest.mark.parametrize("way", [offload, dispatch])
def test_a_conversion_afterwards_says_what_to_do(way, tmp_path):
    model = way(base(), tmp_path)
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match="replace_linear comes before cpu_offload or dispatch_model") as raised:
        replace_linear(model, 3, 5.0)
    assert len(str(raised.value).splitlines()) == 1
    assert before == {name: type(module) for name, module in model.named_modules()}


def test_a_model_of_which_some_is_placed():
    model = base()
    accelerate.cpu_offload(model.model.layers[0].mlp, execution_device=torch.device("cpu"))
    report = replace_linear(model, 3, 5.0)
    offloaded = {f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert {name for name, reason in report.skipped.items() if "cpu_offload" in reason} == offloaded
    assert len(report.replaced) == 11
