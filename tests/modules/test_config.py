"""replace_linear by a config of PEFT: the layers, ranks and scales that PEFT gives."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, replace_linear
from fused_lora.modules.config import LoRAConfig

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(9, 7), nn.Linear(7, 9, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj, self.norm = nn.Linear(9, 9), nn.Linear(9, 5, bias=False), nn.LayerNorm(9)
        self.experts = nn.ModuleList(Expert() for _ in range(2))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 9)
        self.model = nn.ModuleDict({"layers": nn.ModuleList(Block() for _ in range(3)), "h": nn.ModuleList([Expert()])})
        self.layers = nn.ModuleList([Expert()])
        self.score = nn.Linear(9, 2)


CONFIGS = {
    "names": {"target_modules": ["q_proj", "up"]},
    "whole names": {"target_modules": ["model.layers.1.q_proj", "embed"]},
    "an expression": {"target_modules": r".*layers\.[02]\..*(v_proj|down)"},
    "an expression is for whole names": {"target_modules": r"model\.layers\.0\.q_proj|v_proj"},
    "all-linear": {"target_modules": "all-linear"},
    "ALL-Linear": {"target_modules": "ALL-Linear"},
    "excluded names": {"target_modules": ["up", "down"], "exclude_modules": ["0.up"]},
    "an excluded expression": {"target_modules": "all-linear", "exclude_modules": r".*experts.*"},
    "one layer": {"target_modules": ["q_proj", "up"], "layers_to_transform": 1},
    "some layers": {"target_modules": ["q_proj", "down"], "layers_to_transform": [0, 2]},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers of lists": {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": ["layers", "h"]},
    "layers of one list": {"target_modules": ["up"], "layers_to_transform": [0], "layers_pattern": "h"},
    "a whole name and layers": {"target_modules": ["embed", "q_proj"], "layers_to_transform": [1]},
    "rank pattern": {"target_modules": ["q_proj", "up"], "rank_pattern": {"q_proj": 2, "1.q_proj": 4, "q": 1}},
    "anchored patterns": {
        "target_modules": ["q_proj", "up"],
        "rank_pattern": {r"^model.layers.1.q_proj": 2, r"^q_proj": 1, r"layers\.\d\.experts\.1\.up": 5},
        "alpha_pattern": {r"model.layers.(0|2).q_proj": 7, "experts.0.up": 0.5, "proj": 3},
    },
    "alternatives": {"target_modules": ["q_proj", "up"], "alpha_pattern": {"q_proj|up": 7, "experts": 3}},
    "rank-stabilised": {"target_modules": ["q_proj", "up"], "use_rslora": True, "rank_pattern": {"up": 2}},
}  # fmt: skip
NAMED = {name: config for name, config in CONFIGS.items() if not {"layers_to_transform"} & config.keys()}


def theirs(options, model=None):
    """(r, scaling, trains its bias) of each layer that PEFT adapts, and the names of all biases that train."""
    model = peft.inject_adapter_in_model(of("a LoraConfig", options), model or Net())
    layers = {name: module for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    biases = {name for name, parameter in model.named_parameters() if name.endswith("bias") and parameter.requires_grad}
    found = {name: (layer.r["default"], layer.scaling["default"]) for name, layer in layers.items()}
    return found, {name.replace(".base_layer", "") for name in biases}


def ours(model):
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    return {name: (layer.r, layer.scaling) for name, layer in layers.items()}


def of(kind, options, folder=None):
    """A config as a person may have it."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5} | options)
    if kind == "a folder":
        config.save_pretrained(folder)
        return folder
    return config if kind == "a LoraConfig" else {"r": 3, "lora_alpha": 5} | options


@pytest.mark.parametrize("kind", ["a LoraConfig", "a folder", "a dict"])
@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_layers_that_peft_adapts(options, kind, tmp_path):
    model = Net()
    replace_linear(model, config=of(kind, options, tmp_path))
    assert ours(model)
    if kind == "a folder":  # where PEFT sorts patterns, of which the first that matches counts
        options = peft.LoraConfig.from_pretrained(tmp_path).to_dict()
    assert ours(model) == theirs(options)[0]


@pytest.mark.parametrize("options", NAMED.values(), ids=NAMED)
@pytest.mark.filterwarnings("ignore:.* matches no layer")
def test_the_same_by_arguments(options):
    model = Net()
    replace_linear(model, 3, 5, **options)
    assert ours(model) == theirs(options)[0]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_biases(bias):
    options, model = {"target_modules": ["q_proj", "v_proj"], "bias": bias}, Net()
    replace_linear(model, config={"r": 3, **options}, freeze=True)
    trained = {name for name, each in model.named_parameters() if name.endswith("bias") and each.requires_grad}
    wanted = theirs(options)[1] if bias != "none" else set()
    assert trained == wanted


def test_dropout_and_defaults():
    model = Net()
    replace_linear(model, config=peft.LoraConfig(target_modules=["q_proj"], lora_dropout=0.25))
    layer = model.model["layers"][0].q_proj
    assert (layer.r, layer.lora_alpha, layer.lora_dropout) == (8, 8, 0.25)
    assert (LoRAConfig().r, LoRAConfig().lora_alpha) == (8, 8)


@pytest.mark.parametrize(("name", "task"), [
    ("LlamaForCausalLM", None), ("LlamaForSequenceClassification", None), ("LlamaForSequenceClassification", "SEQ_CLS"),
    ("LlamaModel", None),
])  # fmt: skip
def test_all_linear_of_hugging_faces_models(name, task):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=11, num_hidden_layers=1, num_attention_heads=2, vocab_size=9, pad_token_id=0
    )
    model = getattr(transformers, name)(config)
    options = {"target_modules": "all-linear", "task_type": task}
    wanted = theirs(options, copy.deepcopy(model))[0]
    if task is None:
        argued = copy.deepcopy(model)
        replace_linear(argued, 3, 5, "all-linear")
        assert ours(argued) == wanted
    replace_linear(model, config=peft.LoraConfig(r=3, lora_alpha=5, **options))
    assert ours(model) == wanted


UNSERVED = {
    "lora_bias": True, "modules_to_save": ["score"], "layer_replication": [(0, 2)],
    "trainable_token_indices": [1], "target_parameters": ["embed.weight"], "alora_invocation_tokens": [1],
    "init_lora_weights": "gaussian", "ensure_weight_tying": True,
}  # fmt: skip


@pytest.mark.parametrize("name", UNSERVED)
def test_fields_that_are_not_served(name):
    model = Net()
    config = peft.LoraConfig(target_modules=["q_proj"], **{name: UNSERVED[name]})
    with pytest.raises(ValueError, match=f"config asks for what is not served: {name}="):
        replace_linear(model, config=config)
    assert not ours(model)


def test_every_field_of_peft_is_known():
    """A field that PEFT has added since is looked at once: does it change the mathematics?"""
    from fused_lora.modules.config import UNSERVED

    inert = {
        "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "fan_in_fan_out", "init_lora_weights", "loftq_config", "eva_config", "corda_config",
        "lora_ga_config", "qalora_group_size", "megatron_core",
    }  # fmt: skip
    theirs = peft.LoraConfig().to_dict().keys()
    assert theirs - inert - set(UNSERVED) <= LoRAConfig.__dataclass_fields__.keys()
    assert set(UNSERVED) | LoRAConfig.__dataclass_fields__.keys() <= theirs


BESIDE = {
    "r": 4, "lora_alpha": 2.0, "target_modules": ["q_proj"], "exclude_modules": ["q_proj"], "lora_dropout": 0.1,
    "use_rslora": True, "train_bias": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", BESIDE)
def test_a_config_beside_arguments(name):
    model = Net()
    with pytest.raises(ValueError, match=f"give config or {name}, not both"):
        replace_linear(model, config={"target_modules": ["q_proj"]}, **{name: BESIDE[name]})
    assert not ours(model)


BAD = {
    "no targets": ({}, "target_modules must name layers"),
    "targets that are nowhere": ({"target_modules": ["k_proj"]}, "matches no nn.Linear"),
    "a bias": ({"target_modules": ["q_proj"], "bias": "some"}, "bias must be one of none, all, lora_only"),
    "layers of an expression": ({"target_modules": "q", "layers_to_transform": [1]}, "needs a list as target"),
    "a list without layers": ({"target_modules": ["q_proj"], "layers_pattern": "h"}, "layers_pattern needs"),
    "a rank": ({"target_modules": ["q_proj"], "rank_pattern": {"1.q_proj": 0}}, "r must be between 1"),
    "a field that is nearly one": ({"target_module": ["q_proj"]}, "field 'target_module': 'target_modules' is meant"),
    "another method": ({"target_modules": ["q_proj"], "peft_type": "IA3"}, "peft_type='IA3'"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "words"), BAD.values(), ids=BAD)
def test_bad_configs(config, words):
    model = Net()
    with pytest.raises(ValueError, match=words):
        replace_linear(model, config=config)
    assert not ours(model)


def test_what_is_no_config(tmp_path):
    with pytest.raises(TypeError, match="config must be a LoraConfig, a folder or a dict, got int"):
        replace_linear(Net(), config=3)
    with pytest.raises(ValueError, match="is no folder"):
        replace_linear(Net(), config=tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no adapter_config\.json"):
        replace_linear(Net(), config=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"target_modules": ["q_proj"]}))
    replace_linear(Net(), config=str(tmp_path))


def test_a_pattern_that_names_no_layer_is_said():
    with pytest.warns(UserWarning, match="rank_pattern entry 'k_proj' matches no layer that is replaced"):
        report = replace_linear(Net(), 3, 5, ["q_proj"], rank_pattern={"k_proj": 2})
    assert report.unmatched == ["rank_pattern entry 'k_proj'"]


def test_an_alpha_that_was_left_out():
    model = Net()
    with pytest.warns(UserWarning, match=r"scale is 1 / r .*PEFT's default is 8") as caught:
        replace_linear(model, 4)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert ours(model)["embed"] == (4, 0.25)


def test_without_r():
    with pytest.raises(TypeError, match="r must be an int, got NoneType"):
        replace_linear(Net(), lora_alpha=2.0)


def test_the_factors_have_the_ranks_of_the_pattern():
    model = Net()
    replace_linear(model, 3, 5, ["q_proj"], rank_pattern={"1.q_proj": 4})
    layer = model.model["layers"][1].q_proj
    assert layer.lora_A.shape == (4, 9)
    assert layer(torch.ones(2, 9)).shape == (2, 9)


@pytest.mark.parametrize("name", ["target_modules", "exclude_modules"])
def test_a_string_that_is_no_expression(name):
    with pytest.raises(ValueError, match=rf"{name} must be a regular expression where it is a string, got '\('"):
        replace_linear(nn.Sequential(nn.Linear(3, 3)), 2, 3.0, **{name: "("})


def test_a_rank_that_is_missing_is_said_before_all_else():
    with pytest.raises(TypeError, match="r must be an int, got NoneType"):
        replace_linear(nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(TypeError, match="r must be an int, got NoneType"):
        replace_linear(nn.Sequential(nn.Linear(3, 3)), config={"r": None, "target_modules": ["0"]})
