"""Adapters of banks as files, against PEFT."""

import copy
import json

import peft
import pytest
import torch

from fused_lora import LoRABank, adapter_parameters, add_adapter, load_adapter, route, save_adapter, whole_files
from fused_lora.adapters import files
from tests.adapters.models import by_peft, net, randomised, x_of

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs
CONFIGS = {
    "one": {"r": 3, "lora_alpha": 5},
    "two": {"r": 16, "lora_alpha": 4, "use_rslora": True, "target_modules": ["up"]},
    "three": {"r": 5, "rank_pattern": {"layers.1.up": 20}, "alpha_pattern": {"down": 2}},
}


@pytest.fixture
def folders(tmp_path):
    """Of PEFT's, with the models that they are of."""
    models = {name: by_peft(**config) for name, config in CONFIGS.items()}
    for seed, (name, model) in enumerate(models.items()):
        randomised(model, seed)
        model.save_pretrained(tmp_path / name)
    return {name: (tmp_path / name, model) for name, model in models.items()}


def loaded(folders):
    model = net()
    for name, (folder, _) in folders.items():
        load_adapter(model, folder, name)
    return model


@torch.no_grad()
def routed(model, names, x):
    with route(model, names):
        return model(x)


@torch.no_grad()
def test_peft_and_back(folders, tmp_path):
    model, x = loaded(folders), x_of()
    for name, (folder, theirs) in folders.items():
        assert torch.allclose(routed(model, name, x), theirs.eval()(x), atol=1e-5)
        save_adapter(model, tmp_path / "again", name)
        before, after = files.read(folder), files.read(tmp_path / "again")
        assert before[1].keys() == after[1].keys()
        assert all(torch.equal(before[1][key], after[1][key]) for key in before[1])
        again = peft.PeftModel.from_pretrained(net(), tmp_path / "again")
        assert torch.allclose(again.eval()(x), theirs.eval()(x), atol=1e-5)


@torch.no_grad()
def test_a_batch_as_by_adapter_names(folders):
    """PEFT's own way to give rows adapters, "__base__" too."""
    names = ["two", "one", "__base__", "three", "one"]
    first, *others = folders
    theirs = peft.PeftModel.from_pretrained(net(), folders[first][0], adapter_name=first)
    for name in others:
        theirs.load_adapter(folders[name][0], name)
    x = torch.randn(5, 4, 9, generator=torch.Generator().manual_seed(5))
    want = theirs.eval()(x, adapter_names=names)
    assert torch.allclose(routed(loaded(folders), names, x), want, atol=1e-5)


@torch.no_grad()
def test_an_adapter_that_is_there_gets_the_files_values(folders, tmp_path):
    model = net()
    add_adapter(model, "mine", 3, 99.0, target_modules=["up", "down"])
    factors = [factor for name, factor in model.named_parameters() if "lora_" in name]
    load_adapter(model, folders["one"][0], "mine")
    x = x_of()
    assert torch.allclose(routed(model, "mine", x), folders["one"][1].eval()(x), atol=1e-5)
    assert [factor for name, factor in model.named_parameters() if "lora_" in name] == factors


def test_frozen_stays_frozen(folders):
    """Whatever is loaded beside it."""
    model = loaded({"one": folders["one"]})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_A.one" in name)
    load_adapter(model, folders["three"][0], "three")
    load_adapter(model, folders["one"][0], "one")
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_A.one" in name or ".three" in name)


def test_factors_in_16_bits_if_asked_for(folders):
    model = net(torch.bfloat16)
    load_adapter(model, folders["one"][0], "one", lora_dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    model = net(torch.bfloat16)
    load_adapter(model, folders["one"][0], "one")
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}


def _changed(folders, tmp_path, change):
    config, tensors = files.read(folders["one"][0])
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(config, tensors)
    whole_files.write_together(tmp_path / "changed", files.writers(config, tensors))
    return tmp_path / "changed"


KEY = "base_model.model.layers.0.up.lora_A.weight"


@pytest.mark.parametrize(("change", "words"), [
    (lambda config, tensors: tensors[KEY].fill_(float("nan")), f"{KEY} is not finite"),
    (lambda config, tensors: tensors.update({KEY: torch.zeros(4, 9)}), r"has the shape \(4, 9\)"),
    (lambda config, tensors: tensors.pop(KEY), f"missing {KEY}"),
    (lambda config, tensors: tensors.update({KEY.replace("up", "norm"): torch.zeros(3, 9)}),
     "LayerNorm there|one is not there"),
    (lambda config, tensors: tensors.update({KEY.replace("up", "no"): torch.zeros(3, 9)}),
     "no such module|one is not there"),
    (lambda config, tensors: tensors.clear(), "it has no factors"),
    (lambda config, tensors: config.update(use_dora=True), "banks have no magnitudes"),
    (lambda config, tensors: config.update(lora_bias=True), "not served: lora_bias=True"),
    (lambda config, tensors: tensors.update({"base_model.model.layers.0.up.bias": torch.zeros(7)}), "unexpected bias"),
])  # fmt: skip
@pytest.mark.parametrize("is_there", [False, True])
def test_files_that_do_not_fit(change, words, is_there, folders, tmp_path):
    model = loaded({"one": folders["one"]} if is_there else {"three": folders["three"]})
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        load_adapter(model, _changed(folders, tmp_path, change), "one")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_names(folders, tmp_path):
    model = loaded(folders)
    with pytest.raises(ValueError, match="name must be given of a model with LoRABank layers"):
        load_adapter(model, folders["one"][0])
    with pytest.raises(ValueError, match="name must be given of a model with LoRABank layers"):
        save_adapter(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"adapter of the model \(one, three, two\), got 'z'"):
        save_adapter(model, tmp_path / "x", "z")
    with pytest.raises(ValueError, match="name must not be empty, have dots"):
        load_adapter(net(), folders["one"][0], "a.b")
    with pytest.raises(ValueError, match="up has r=3, the config says r=16"):
        load_adapter(model, folders["two"][0], "one")
    with pytest.raises(ValueError, match="name is of adapters of LoRABank layers"):
        save_adapter(net(), tmp_path / "x", "one")


@pytest.mark.filterwarnings("default")
def test_factors_that_are_finite_in_their_file_alone_are_refused(tmp_path):
    model = net()
    add_adapter(model, "a", r=4, lora_alpha=8, target_modules=["up"])
    with torch.no_grad():
        adapter_parameters(model, "a")[0][0, 0] = 1e6
    save_adapter(model, tmp_path / "a", "a")
    other = net()
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite in torch\.float16"):
        load_adapter(other, tmp_path / "a", "a", torch.float16)
    assert not [name for name, _ in other.named_parameters() if "lora_" in name]
    add_adapter(other, "b", r=4, lora_alpha=8, target_modules=["up"], lora_dtype=torch.float16)
    with pytest.raises(ValueError, match=r"lora_A\.weight is not finite in torch\.float16"):
        load_adapter(other, tmp_path / "a", "a")
    load_adapter(model, tmp_path / "a", "b")


def test_dropout_is_loaded_and_saved(folders, tmp_path):
    folder = _changed(folders, tmp_path, lambda config, tensors: config.update(lora_dropout=0.1))
    model = net()
    for _ in range(2):  # as a new one, and into what is there
        load_adapter(model, folder, "one")
        banks = [module for module in model.modules() if isinstance(module, LoRABank)]
        assert {bank.adapters["one"].lora_dropout for bank in banks} == {0.1}
    save_adapter(model, tmp_path / "again", "one")
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_dropout"] == 0.1


def test_the_first_adapter_that_is_loaded_freezes_the_rest(tmp_path):
    """As without a name; what trains beside adapters that are there stays as it is."""
    model = net()
    add_adapter(model, "a", r=4, lora_alpha=8, target_modules=["up"])
    save_adapter(model, tmp_path / "a", "a")
    new = net()
    load_adapter(new, tmp_path / "a", "a")
    assert {name for name, each in new.named_parameters() if each.requires_grad} == {
        f"layers.{i}.up.{factors}.a" for i in range(2) for factors in ("lora_A", "lora_B")
    }
    new.out.requires_grad_(True)
    load_adapter(new, tmp_path / "a", "b")
    assert new.out.weight.requires_grad
