"""load_adapter: what PEFT saved, value for value; what does not fit is listed, and nothing is changed."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fused_lora import load_adapter, replace_linear, save_adapter

from .models import Net, adapted, assert_same_layers, by_peft, net, outputs, randomised

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs
CONFIGURATIONS = {
    "plain": {},
    "patterns": {"rank_pattern": {"up": 2, "down": 4}, "alpha_pattern": {"^layers.0.up": 7, r"1\.(up|down)": 2.5}},
    "rank-stabilised patterns": {"use_rslora": True, "rank_pattern": {"up": 2}, "alpha_pattern": {"down": 9}},
    "all biases": {"bias": "all"},
    "the layers' biases": {"bias": "lora_only"},
    "all linears": {"target_modules": "all-linear"},
    "an expression": {"target_modules": r".*\.1\.(up|down)"},
    "one layer of several": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "without one": {"exclude_modules": ["0.up"]},
    "another beginning": {"init_lora_weights": "gaussian"},
}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def everything(model):
    """What a refusal must leave as it is."""
    state = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    layers = {name: each[:2] for name, each in adapted(model).items()}
    return state, layers, [type(module) for module in model.modules()], model.__dict__.keys() - {"_lora_configs"}


def assert_unchanged(model, before):
    after = everything(model)
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, (identity, trains, value) in before[0].items():
        assert after[0][name][:2] == (identity, trains)
        assert torch.equal(after[0][name][2], value)


@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_what_peft_saved(options, tmp_path):
    saved = by_peft(**options)
    saved.save_pretrained(tmp_path)
    model = net()
    report = load_adapter(model, tmp_path)
    assert set(report.replaced) == adapted(saved).keys()
    assert_same_layers(model, saved)
    torch.testing.assert_close(outputs(model), outputs(saved), rtol=1e-12, atol=1e-12)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "bias" not in name} == {
        f"{name}.lora_{which}" for name in adapted(saved) for which in "AB"
    }


def test_into_layers_that_are_there(tmp_path):
    saved = by_peft(alpha_pattern={"up": 2.5}, use_rslora=True, bias="all")
    saved.save_pretrained(tmp_path)
    model = net()
    replace_linear(model, 3, 1.5, ["up", "down"], lora_dropout=0.25)
    layers = [model.layers[0].up, model.layers[1].down]
    factor, scale = layers[0].lora_A, layers[0].scale
    assert load_adapter(model, tmp_path) is None
    assert [model.layers[0].up, model.layers[1].down] == layers
    assert layers[0].lora_A is factor
    assert layers[0].scale is scale  # which captured CUDA graphs read
    assert layers[0].lora_dropout == 0.25
    assert_same_layers(model, saved)
    torch.testing.assert_close(outputs(model), outputs(saved), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("written", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16, torch.float64])
def test_no_value_is_rounded(base, written, tmp_path):
    by_peft().save_pretrained(tmp_path)
    tensors = {key: tensor.to(written) for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    model = net(base)
    load_adapter(model, tmp_path)
    for name, (_, _, A, B, _) in adapted(model).items():
        assert A.dtype == B.dtype == torch.promote_types(base, written)
        assert torch.equal(A, tensors[f"base_model.model.{name}.lora_A.weight"].to(A.dtype))
        assert torch.equal(B, tensors[f"base_model.model.{name}.lora_B.weight"].to(A.dtype))


def test_of_an_injected_model(tmp_path):
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["up"], bias="lora_only")
    saved = randomised(peft.inject_adapter_in_model(config, net()))
    state = peft.get_peft_model_state_dict(saved)
    assert not any(key.startswith("base_model") for key in state)
    save_file(state, tmp_path / WEIGHTS)
    config.save_pretrained(tmp_path)
    model = net()
    load_adapter(model, tmp_path)
    assert_same_layers(model, saved)


def test_saved_to_the_path_that_it_was_loaded_from(tmp_path):
    by_peft().save_pretrained(tmp_path)
    model = net()
    load_adapter(model, tmp_path)
    want = copy.deepcopy(model)
    for _ in range(3):
        save_adapter(model, tmp_path)
        load_adapter(model, tmp_path)
    assert_same_layers(model, want)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_weights_of_the_base_beside_the_factors(tmp_path):
    """PEFT writes those of heads and embeddings where a head has an adapter."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=12, intermediate_size=20, num_attention_heads=2, num_hidden_layers=1
    )
    base = LlamaForCausalLM(config)
    targets = ["q_proj", "lm_head"]
    saved = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=targets))
    saved = randomised(saved)
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    key = "base_model.model.lm_head.base_layer.weight"
    tensors = load_file(tmp_path / WEIGHTS)
    assert key in tensors
    model = copy.deepcopy(base)
    for _ in range(2):  # into linears, and into layers
        load_adapter(model, tmp_path)
        tokens = torch.arange(8)[None]
        torch.testing.assert_close(model(tokens).logits, saved(tokens).logits)
    tensors[key] = tensors[key] + 1
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    before = everything(model)
    with pytest.raises(ValueError, match=f"{key} is of another base"):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def damaged(folder, change=None, **fields):
    """A file of PEFT with other tensors and other fields."""
    by_peft().save_pretrained(folder)
    tensors = load_file(folder / WEIGHTS)
    if change:
        change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(config))


def spoil(tensors):
    up, down = "base_model.model.layers.0.up", "base_model.model.layers.1.down"
    del tensors[f"{up}.lora_A.weight"]
    tensors[f"{down}.lora_B.weight"] = torch.ones(4, 3)
    tensors["base_model.model.layers.7.up.lora_A.weight"] = torch.ones(3, 9)
    tensors["base_model.model.layers.7.up.lora_B.weight"] = torch.ones(7, 3)
    tensors["base_model.model.out.bias"] = torch.ones(6)
    tensors["base_model.model.embed.weight"] = torch.ones(6)


@pytest.mark.parametrize("converted", [False, True])
def test_all_that_does_not_fit_is_listed(converted, tmp_path):
    damaged(tmp_path, spoil)
    model = net()
    if converted:
        replace_linear(model, 3, 1.5, ["up", "down"])
    before = everything(model)
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        load_adapter(model, tmp_path)
    for words in (
        "missing base_model.model.layers.0.up.lora_A.weight",
        "base_model.model.layers.1.down.lora_B.weight has the shape (4, 3), the model (9, 3)",
        "unexpected base_model.model.layers.7.up.lora_A.weight",
        "the bias of out has the shape (6,), the model (5,)",
        "unexpected base_model.model.embed.weight",
    ):
        assert words in str(caught.value)
    assert_unchanged(model, before)


def merged(model):
    model.layers[0].up.merge_()


def on_meta(model):
    model.layers[0].up.to("meta")


LAYERS = {
    "more layers": (lambda model: replace_linear(model, 3, 2.0, ["out"]), "missing base_model.model.out.lora_A.weight"),
    "merged": (merged, "layers.0.up is merged"),
    "offloaded": (on_meta, "layers.0.up.lora_A is on meta"),
}


@pytest.mark.parametrize(("change", "words"), LAYERS.values(), ids=LAYERS)
def test_layers_that_do_not_fit(change, words, tmp_path):
    damaged(tmp_path)
    model = net()
    replace_linear(model, 3, 1.5, ["up", "down"])
    change(model)
    layers = {name: each[:2] for name, each in adapted(model).items()}
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
    assert {name: each[:2] for name, each in adapted(model).items()} == layers


@pytest.mark.parametrize("r", [2, 4])
def test_another_rank(r, tmp_path):
    damaged(tmp_path)
    model = net()
    replace_linear(model, r, 1.5, ["up", "down"])
    with pytest.raises(ValueError, match=rf"layers\.0\.up has r={r}, the config says r=3"):
        load_adapter(model, tmp_path)


class Tied(Net):
    def __init__(self):
        super().__init__()
        self.layers[1].up.weight = self.layers[0].up.weight


BASES = {
    "a tied linear": (Tied, r"layers.0.up cannot be replaced: its weight is shared"),
    "other names": (lambda: nn.ModuleDict({"model": net()}), r"no such module there"),
    "other modules": (lambda: nn.Sequential(nn.Linear(3, 4)), r"no such module there"),
    "more layers": (lambda: Net(3), r"missing base_model.model.layers.2.up.lora_A.weight"),
    "on meta": (lambda: net().to("meta"), r"layers.0.up is on meta"),
}


@pytest.mark.parametrize(("base", "words"), BASES.values(), ids=BASES)
def test_another_base(base, words, tmp_path):
    damaged(tmp_path)
    model = base()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path)
    assert [type(module) for module in model.modules()] == kinds


FIELDS = {
    "lora_bias": True, "layer_replication": [[0, 1]], "modules_to_save": ["out"],
    "alora_invocation_tokens": [1], "trainable_token_indices": [3], "target_parameters": ["x"], "use_qalora": True,
    "init_lora_weights": "pissa_niter_4", "peft_type": "IA3",
}  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_are_not_served(name, tmp_path):
    damaged(tmp_path, **{name: FIELDS[name]})
    model = net()
    before = everything(model)
    with pytest.raises(ValueError, match=f"config asks for what is not served: .*{name}="):
        load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_the_error_lists_all_such_fields(tmp_path):
    damaged(tmp_path, lora_bias=True, modules_to_save=["out"])
    with pytest.raises(ValueError, match=r"lora_bias=True, modules_to_save=\['out'\]"):
        load_adapter(net(), tmp_path)


FOLDERS = {
    "nothing": (lambda folder: None, "is no folder"),
    "no config": (lambda folder: folder.mkdir(), "has no adapter_config.json"),
    "no weights": (lambda folder: (damaged(folder), (folder / WEIGHTS).unlink()), f"has no {WEIGHTS}"),
    "cut weights": (
        lambda folder: (damaged(folder), (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9])),
        f"{WEIGHTS} is damaged",
    ),
    "cut config": (lambda folder: (damaged(folder), (folder / CONFIG).write_text('{"r": ')), f"{CONFIG} is damaged"),
    "a list": (lambda folder: (damaged(folder), (folder / CONFIG).write_text("[1]")), "holds no table"),
    "integers": (lambda folder: damaged(folder, lambda all: all.update({k: v.int() for k, v in all.items()})), "int32"),
}


@pytest.mark.parametrize(("make", "words"), FOLDERS.values(), ids=FOLDERS)
def test_folders_that_are_no_adapter(make, words, tmp_path):
    make(tmp_path / "adapter")
    model = net()
    before = everything(model)
    with pytest.raises(ValueError, match=words):
        load_adapter(model, tmp_path / "adapter")
    assert_unchanged(model, before)
