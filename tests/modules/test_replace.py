"""replace_linear: what it replaces, what it leaves and says so, and that it touches nothing else."""

import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, replace_linear

OPTIONS = dict(r=4, lora_alpha=6.0)


class Attention(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        return self.norm(x + self.v_proj(torch.relu(self.q_proj(x))))


class SubLinear(nn.Linear):
    pass


def stack(depth=2):
    return nn.Sequential(nn.Embedding(9, 16), *(Attention() for _ in range(depth)), nn.Linear(16, 9))


def everything(model):
    """What a replacement must not change: identity and requires_grad of every parameter, by name."""
    return {name: (id(p), p.requires_grad) for name, p in model.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize(("targets", "replaced"), [
    (["q_proj"], ["1.q_proj", "2.q_proj"]),
    (["q_proj", "3"], ["1.q_proj", "2.q_proj", "3"]),
    (["1.q_proj"], ["1.q_proj"]),
    (("v_proj",), ["1.v_proj", "2.v_proj"]),
    (r".*\.[qv]_proj", ["1.q_proj", "1.v_proj", "2.q_proj", "2.v_proj"]),
    (r"2\.q.*", ["2.q_proj"]),
    (None, ["1.q_proj", "1.v_proj", "2.q_proj", "2.v_proj", "3"]),
])  # fmt: skip
def test_targets(targets, replaced):
    model = stack()
    names = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    report = replace_linear(model, target_modules=targets, **OPTIONS)
    assert report.replaced == replaced
    assert report.skipped == {name: "not in target_modules" for name in names if name not in replaced}
    assert [name for name, module in model.named_modules() if isinstance(module, LoRALinear)] == replaced
    assert [name for name, module in model.named_modules() if type(module) is nn.Linear] == list(report.skipped)


@pytest.mark.parametrize(("excluded", "replaced"), [
    (["q_proj", "3"], ["1.v_proj", "2.v_proj"]),
    (r"1\..*|3", ["2.q_proj", "2.v_proj"]),
])  # fmt: skip
def test_exclusions(excluded, replaced):
    report = replace_linear(stack(), exclude_modules=excluded, **OPTIONS)
    assert report.replaced == replaced
    assert set(report.skipped.values()) == {"in exclude_modules"}


def test_a_name_matches_whole_parts_only():
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "q_proj": nn.Linear(4, 4), "proj_2": nn.Linear(4, 4)})
    assert replace_linear(model, target_modules=["proj"], **OPTIONS).replaced == ["proj"]


def test_names_from_an_iterator():
    names = ["2.v_proj", "1.q_proj", "3"]
    assert set(replace_linear(stack(), target_modules=iter(names), **OPTIONS).replaced) == set(names)


def test_the_report_in_words():
    report = replace_linear(stack(1), target_modules=["q_proj"], **OPTIONS)
    assert str(report).splitlines() == [
        "replaced 1 linear layers, left 2",
        "trains 713 of 985 parameters (72.3858%), 585 of them outside the updates: freeze=True leaves those out",
        "  + 1.q_proj",
        "  - 1.v_proj: not in target_modules",
        "  - 2: not in target_modules",
    ]


def test_the_options_reach_the_layers():
    model = stack(1).eval()
    replace_linear(model, 5, 7.0, ["q_proj"], lora_dropout=0.25, use_rslora=True, lora_dtype=torch.float64)
    layer = model[1].q_proj
    assert (layer.r, layer.lora_alpha, layer.lora_dropout, layer.use_rslora) == (5, 7.0, 0.25, True)
    assert layer.lora_A.dtype is torch.float64
    assert not layer.training


def test_the_function_is_unchanged_and_trains():
    model = stack()
    ids = torch.randint(9, (3, 5))
    want = model(ids)
    replace_linear(model, target_modules=["q_proj", "v_proj"], **OPTIONS)
    torch.testing.assert_close(model(ids), want)
    model(ids).square().sum().backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for layer in model.modules() if isinstance(layer, LoRALinear))


@pytest.mark.parametrize("train_bias", [True, False])
def test_nothing_else_is_touched(train_bias):
    model = stack()
    model[2].v_proj.weight.requires_grad_(False)
    before = everything(model)
    report = replace_linear(model, target_modules=["q_proj"], train_bias=train_bias, **OPTIONS)
    after = everything(model)
    for name, (identity, trainable) in before.items():
        layer, _, parameter = name.rpartition(".")
        if layer in report.replaced:
            trainable = parameter == "bias" and train_bias
        assert after.pop(name) == (identity, trainable), name
    new = {f"{layer}.{name}" for layer in report.replaced for name in ("lora_A", "lora_B")}
    assert set(after) == new
    assert all(trainable for _, trainable in after.values())


@pytest.mark.parametrize("train_bias", [True, False])
def test_freeze_leaves_only_the_updates_training(train_bias):
    model = stack()
    replace_linear(model, target_modules=["v_proj"], **OPTIONS)
    report = replace_linear(model, target_modules=["q_proj"], train_bias=train_bias, freeze=True, **OPTIONS)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts = {"q_proj": ["lora_A", "lora_B", *["bias"] * train_bias], "v_proj": ["lora_A", "lora_B"]}
    assert trained == {f"{i}.{layer}.{part}" for i in (1, 2) for layer in parts for part in parts[layer]}
    assert report.trainable == report.updates == 4 * 2 * 4 * 16 + 2 * 16 * train_bias


@pytest.mark.parametrize("options", [
    dict(target_modules=["nowhere"]),
    dict(target_modules="nowhere"),
    dict(target_modules="q_proj"),  # a regular expression is for the whole name
    dict(target_modules=[]),
    dict(exclude_modules=".*"),
])  # fmt: skip
def test_replacing_nothing_raises(options):
    model = stack()
    before = everything(model)
    what = "target_modules matches" if "target_modules" in options else "model has"
    with pytest.raises(ValueError, match=rf"^{what} no nn\.Linear that can be replaced"):
        replace_linear(model, **OPTIONS, **options)
    assert everything(model) == before


def test_a_model_that_is_a_linear():
    with pytest.raises(ValueError, match=r"use LoRALinear\.from_linear"):
        replace_linear(nn.Linear(4, 4), **OPTIONS)


def test_a_second_call_replaces_nothing():
    model = stack()
    replace_linear(model, **OPTIONS)
    before = everything(model)
    with pytest.raises(ValueError, match=r"^model has no nn\.Linear that can be replaced") as error:
        replace_linear(model, **OPTIONS)
    assert "1.q_proj and 4 others: a LoRALinear already" in str(error.value)
    assert everything(model) == before


@pytest.mark.parametrize(("options", "error", "message"), [
    (dict(r=0), ValueError, "r must be between 1 and 512, got 0"),
    (dict(r=True), TypeError, "r must be an int"),
    (dict(lora_alpha=float("inf")), ValueError, "lora_alpha must be finite"),
    (dict(lora_dropout=1.5), ValueError, "lora_dropout must be between 0 and 1"),
])  # fmt: skip
def test_bad_options_change_nothing(options, error, message):
    model = stack()
    before = everything(model)
    with pytest.raises(error, match=message):
        replace_linear(model, **OPTIONS | options)
    assert everything(model) == before


def shared_module():
    linear = nn.Linear(4, 4)
    return nn.ModuleDict({"first": linear, "other": nn.Linear(4, 4), "second": linear})


def test_a_module_under_two_names_is_replaced_at_both():
    model = shared_module()
    weight = model["first"].weight
    report = replace_linear(model, target_modules=["first"], **OPTIONS)
    assert report.replaced == ["first"]
    assert isinstance(model["first"], LoRALinear)
    assert model["second"] is model["first"]
    assert model["first"].weight is weight
    assert type(model["other"]) is nn.Linear


def test_a_shared_block_is_replaced_once():
    block = Attention()
    model = nn.Sequential(block, nn.ReLU(), block)
    replace_linear(model, target_modules=["q_proj"], **OPTIONS)
    assert model[0] is model[2]
    assert isinstance(block.q_proj, LoRALinear)
    assert sum(p.requires_grad for name, p in model.named_parameters() if "lora" in name) == 2


def test_a_module_is_found_by_its_second_name():
    model = shared_module()
    replace_linear(model, target_modules=["second"], **OPTIONS)
    assert isinstance(model["second"], LoRALinear)


def test_a_shared_bias_is_not_frozen_under_another_module():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in ("target", "plain", "other")})
    model["other"].bias = model["target"].bias
    replace_linear(model, target_modules=["target", "plain"], **OPTIONS)
    assert model["other"].bias.requires_grad


def test_an_overridden_forward_is_left_alone():
    model = nn.ModuleDict({"odd": nn.Linear(4, 4), "plain": nn.Linear(4, 4)})
    odd = model["odd"]
    odd.forward = lambda x: nn.Linear.forward(odd, x) + 1
    x = torch.randn(2, 4)
    want = odd(x)
    replace_linear(model, **OPTIONS)
    torch.testing.assert_close(model["odd"](x), want)


def test_a_failure_half_way_changes_nothing(monkeypatch):
    model, made = stack(), []

    def beside(*arguments):
        made.append(arguments)
        if len(made) == 3:
            raise torch.OutOfMemoryError
        return whole(*arguments)

    whole = LoRALinear.beside
    monkeypatch.setattr(LoRALinear, "beside", beside)
    before = everything(model)
    with pytest.raises(torch.OutOfMemoryError):
        replace_linear(model, **OPTIONS)
    assert everything(model) == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(50, (2, 7))
    want, before = model(ids).logits, everything(model)
    report = replace_linear(model, exclude_modules=["k_proj"], **OPTIONS)
    assert len(report.replaced) == 2 * 6
    assert set(report.skipped) == {"lm_head", *(f"model.layers.{i}.self_attn.k_proj" for i in range(2))}
    assert "shared with model.embed_tokens" in report.skipped["lm_head"]
    torch.testing.assert_close(model(ids).logits, want)
    model(ids, labels=ids).loss.backward()
    for name, (identity, trainable) in everything(model).items():
        assert name.rpartition(".")[2] in ("lora_A", "lora_B") or before[name][0] == identity
        assert trainable != (name.removesuffix(".weight") in report.replaced)
