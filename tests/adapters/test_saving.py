"""save_adapter: files that PEFT loads, value for value."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors import safe_open
from torch import nn

import fused_lora
from fused_lora import LoRALinear, load_adapter, replace_linear, save_adapter

from .models import adapted, assert_same_layers, by_peft, net, outputs, randomised, x_of

pytestmark = pytest.mark.filterwarnings("default")  # PEFT warns of its own affairs
WAYS = {
    "plain": {},
    "one layer": {"target_modules": ["layers.1.up"]},
    "an expression": {"target_modules": r".*\.up|out"},
    "ranks and alphas": {"rank_pattern": {"up": 2}, "alpha_pattern": {r"^layers\.0\.up": 7, "down": 0.5}},
    "rank-stabilised": {"use_rslora": True, "rank_pattern": {"0.down": 1}},
    "biases": {"train_bias": True},
}


def ours(**options):
    model = net()
    options = {"r": 3, "lora_alpha": 5, "target_modules": ["up", "down"]} | options
    replace_linear(model, freeze=True, **options)
    return randomised(model)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_peft_loads_it(options, tmp_path):
    model = ours(**options)
    save_adapter(model, tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter")
    assert_same_layers(model, loaded)
    torch.testing.assert_close(outputs(model), outputs(loaded), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
def test_the_numbers_in_the_file(options, tmp_path):
    """An independent reading: W + scale B A from the two files alone."""
    model = ours(**options)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    file = safe_open(tmp_path / "adapter_model.safetensors", "pt")
    assert file.metadata() == {"format": "pt"}
    keys = {key for name in adapted(model) for key in (f"{name}.lora_A.weight", f"{name}.lora_B.weight")}
    biases = {f"{name}.base_layer.bias" for name, layer in adapted(model).items() if layer[4] is not None}
    keys |= biases if options.get("train_bias") else set()
    assert set(file.keys()) == {f"base_model.model.{key}" for key in keys}
    for name, (r, scaling, A, B, _) in adapted(model).items():
        in_file = [file.get_tensor(f"base_model.model.{name}.lora_{which}.weight") for which in "AB"]
        assert [tensor.shape for tensor in in_file] == [(r, A.shape[1]), (B.shape[0], r)]
        assert torch.equal(in_file[0], A)
        assert torch.equal(in_file[1], B)
        assert scaling != 1
    assert config["peft_type"] == "LORA"
    assert config["bias"] == ("lora_only" if options.get("train_bias") else "none")


def test_layers_made_apart_are_one_adapter(tmp_path):
    model = net()
    replace_linear(model, 2, 3.0, ["up"], freeze=True)
    replace_linear(model, 4, 5.0, ["1.down", "out"], freeze=True)
    randomised(model)
    save_adapter(model, tmp_path)
    assert_same_layers(model, peft.PeftModel.from_pretrained(net(), tmp_path))


def test_targets_that_no_list_of_names_describes(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj, self.inner = nn.Linear(9, 5), nn.ModuleDict({"proj": nn.Linear(9, 5)})

        def forward(self, x):
            return self.proj(x) + self.inner["proj"](x)

    torch.manual_seed(0)
    base = Twice()
    state = base.state_dict()
    replace_linear(base, 2, 3.0, "proj", freeze=True)
    save_adapter(randomised(base), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == "proj"
    other = Twice()
    other.load_state_dict(state)
    assert_same_layers(base, peft.PeftModel.from_pretrained(other, tmp_path))


def test_the_order_of_a_pattern_is_kept(tmp_path):
    """The first entry that matches counts."""
    model = net()
    config = {"target_modules": ["up"], "rank_pattern": {"up": 2, "0.up": 4}, "alpha_pattern": {"up": 7, "0.up": 1}}
    replace_linear(model, config=config, freeze=True)
    save_adapter(randomised(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == config["rank_pattern"]
    assert_same_layers(model, peft.PeftModel.from_pretrained(net(), tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [None, torch.float32])
def test_factors_keep_their_dtype(dtype, factors, tmp_path):
    model = net(dtype)
    replace_linear(model, 3, 5.0, ["up"], lora_dtype=factors, freeze=True)
    save_adapter(randomised(model), tmp_path)
    file = safe_open(tmp_path / "adapter_model.safetensors", "pt")
    assert {file.get_tensor(key).dtype for key in file.keys()} == {factors or dtype}  # noqa: SIM118


def test_a_merged_model_is_saved_as_it_was(tmp_path):
    model = ours()
    save_adapter(model, tmp_path / "before")
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.merge_()
    save_adapter(model, tmp_path / "merged")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_what_a_config_says_is_kept(tmp_path):
    """Fields that nothing here knows too; PEFT's own of another version."""
    saved = by_peft(rank_pattern={"up": 2}, alpha_pattern={"0.up": 7}, bias="all", task_type="FEATURE_EXTRACTION")
    saved.save_pretrained(tmp_path / "theirs")
    path = tmp_path / "theirs" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"of_the_future": {"a": [1, None]}, "base_model_name_or_path": "a/b"}
    path.write_text(json.dumps(config))
    model = net()
    load_adapter(model, tmp_path / "theirs")
    save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()) == config


def test_what_has_changed_is_written_over_what_a_config_said(tmp_path):
    by_peft().save_pretrained(tmp_path / "theirs")
    model = net()
    load_adapter(model, tmp_path / "theirs")
    model.layers[0].up.lora_alpha = 11.0
    replace_linear(model, 2, 3.0, ["out"], freeze=True)
    save_adapter(model, tmp_path / "ours")
    assert_same_layers(model, peft.PeftModel.from_pretrained(net(), tmp_path / "ours"))


def test_fields_of_a_config_travel_to_the_file(tmp_path):
    model = net()
    replace_linear(model, config=peft.LoraConfig(r=3, target_modules=["up"], task_type="CAUSAL_LM"), freeze=True)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["lora_alpha"]) == ("CAUSAL_LM", 3, 8)


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, torch.nn.Sequential], ids=["compiled", "dp", "none"])
def test_wrappers_leave_no_trace_in_names(wrap, tmp_path):
    model = ours()
    wrapped = model if wrap is torch.nn.Sequential else wrap(model)
    model.cpu()  # DataParallel takes it to a GPU
    wrapped_inside = ours()
    wrapped_inside.layers[1] = torch.compile(wrapped_inside.layers[1])
    for each in (wrapped, wrapped_inside):
        save_adapter(each, tmp_path)
        assert_same_layers(model, peft.PeftModel.from_pretrained(net(), tmp_path))
        load_adapter(each, tmp_path)


def test_what_trains_beside_the_adapter_is_named(tmp_path):
    model = net()
    replace_linear(model, 3, 5.0, ["up"])
    with pytest.warns(UserWarning, match=r"does not hold layers\.0\.down\.weight, .* and 5 more, which train"):
        save_adapter(model, tmp_path)


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no LoRALinear layers"):
        save_adapter(by_peft(), tmp_path / "x")
    with pytest.raises(ValueError, match="a LoRALinear itself"):
        save_adapter(LoRALinear(3, 4, 2), tmp_path / "x")
    model = ours()
    model.layers[0].up.use_rslora = True
    with pytest.raises(ValueError, match="use_rslora must be the same"):
        save_adapter(model, tmp_path / "x")
    model = ours()
    model.layers[1].up.to("meta")
    with pytest.raises(ValueError, match=r"layers\.1\.up\.lora_A is on meta"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_neither_library_is_imported_with_the_package():
    code = "import fused_lora, sys; print({'safetensors', 'peft', 'transformers'} & sys.modules.keys())"
    root = Path(fused_lora.__file__).parent.parent
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root).stdout
    assert printed.strip() == "set()"


def test_without_safetensors(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for act in (save_adapter, load_adapter):
        with pytest.raises(ImportError, match=r"pip install 'fused_lora\[adapters\]'"):
            act(ours(), tmp_path)


def test_training_goes_on_after_a_save(tmp_path):
    model = ours()
    before = model(x_of())
    save_adapter(model, tmp_path)
    assert torch.equal(model(x_of()), before)
    assert all(layer[2].requires_grad and layer[3].requires_grad for layer in adapted(model).values())
