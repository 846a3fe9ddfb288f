"""An accelerated model through all that PEFT does with one: the same keys, files and values as without."""

import copy
import io
import json
import pickle

import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from fused_lora import replace_linear
from fused_lora.integrations.peft import accelerate, restore
from fused_lora.integrations.peft.linear import AcceleratedLinear
from fused_lora.modules import LoRAMLP

from .models import LLAMA, Net, assert_same, config_of, language_model, net, randomised, results, twin_of

pytestmark = pytest.mark.filterwarnings("default")


def x_of():
    return torch.randn(2, 4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def both(**options):
    """The same model twice, the second one accelerated."""
    plain = net(**options)
    model = twin_of(plain)
    accelerate(model)
    return plain, model


def check(plain, model, tolerance=1e-12):
    assert list(model.state_dict()) == list(plain.state_dict())
    assert_same(results(model, x_of()), results(plain, x_of()), tolerance)


def each(models, act):
    for model in models:
        act(model)


def accelerated(model):
    return [name for name, module in model.named_modules() if isinstance(module, AcceleratedLinear)]


def test_saved_and_loaded(tmp_path):
    plain, model = both()
    each(zip((plain, model), ("plain", "ours"), strict=True), lambda pair: pair[0].save_pretrained(tmp_path / pair[1]))
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "ours").iterdir())
    weights, config = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "ours" / weights).read_bytes() == (tmp_path / "plain" / weights).read_bytes()
    ours, plains = (json.loads((tmp_path / name / config).read_text()) for name in ("ours", "plain"))
    for each_config in (ours, plains):  # target_modules is a set of PEFT's, in any order
        each_config["target_modules"] = sorted(each_config["target_modules"])
    assert ours == plains
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net().double(), tmp_path / "ours", is_trainable=True).double()
    assert accelerated(loaded) == []
    accelerate(loaded)
    check(plain, loaded, 1e-6)  # the file has float32, as PEFT writes it


def test_adapters_added_chosen_and_deleted(alone):
    plain, model = both()
    each((plain, model), lambda model: randomised(_added(model), seed=4))
    check(plain, model)
    each((plain, model), lambda model: model.set_adapter("second"))
    check(plain, model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("second" in name for name in trained)
    each((plain, model), lambda model: model.delete_adapter("second"))
    each((plain, model), lambda model: model.set_adapter("default"))
    check(plain, model)
    assert len(alone) == 6


def _added(model):
    torch.manual_seed(0)
    model.add_adapter("second", config_of(r=2, use_rslora=True))
    return model.double()


def test_layers_that_a_later_adapter_wraps(alone):
    plain, model = both(target_modules=["up"])
    each((plain, model), lambda model: randomised(_added(model), seed=4).set_adapter("second"))
    assert accelerated(model) == ["base_model.model.up"]
    check(plain, model)
    assert len(alone) == 1
    assert accelerate(model).served == ["base_model.model.up", "base_model.model.down"]
    check(plain, model)
    assert len(alone) == 3


def test_adapters_added_up():
    plain, model = both()
    each((plain, model), lambda model: randomised(_added(model), seed=4))
    for model_ in (plain, model):
        model_.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="cat")
        model_.set_adapter("both")
    check(plain, model)


def test_merged_and_unloaded():
    plain, model = both()
    wanted = results(plain, x_of())["y"]
    each((plain, model), lambda model: model.merge_adapter())
    check(plain, model, 0)
    each((plain, model), lambda model: model.unmerge_adapter())
    check(plain, model)
    merged, ours = plain.merge_and_unload(), model.merge_and_unload()
    assert type(ours.up) is nn.Linear
    assert list(ours.state_dict()) == list(merged.state_dict())
    assert torch.equal(ours.up.weight, merged.up.weight)
    torch.testing.assert_close(ours(x_of()), wanted)


def test_a_language_model_merged_and_unloaded(groups, as_one):
    model = language_model(LLAMA)
    plain, ids = twin_of(model), torch.randint(0, 32, (2, 5))
    accelerate(model)
    ours, merged = model.merge_and_unload(), plain.merge_and_unload()
    assert list(ours.state_dict()) == list(merged.state_dict())
    assert torch.equal(ours(ids).logits, merged(ids).logits)
    assert not groups
    assert not as_one
    restore(ours)
    assert [type(module) for module in ours.modules()] == [type(module) for module in merged.modules()]


def test_restored_beside_layers_of_this_package(groups):
    """Which stay as replace_linear made them."""
    model = nn.ModuleList([language_model(LLAMA), language_model(LLAMA).unload()])
    replace_linear(model[1], r=2, lora_alpha=3, target_modules=["q_proj", "k_proj", "v_proj"])
    accelerate(model)
    restore(model)
    ids = torch.randint(0, 32, (2, 5))
    for each in model:
        each(ids)
    assert groups == [3, 3]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, groups, as_one, alone):
    model = language_model(LLAMA)
    accelerate(model)
    ids = torch.randint(0, 32, (2, 5))
    wanted = results(model, ids)
    computed = (len(groups), len(as_one), len(alone))
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert accelerated(twin) == accelerated(model)
    assert_same(results(twin, ids), wanted, 0)
    assert (len(groups), len(as_one), len(alone)) == tuple(2 * count for count in computed)


def test_restored(groups, as_one, alone):
    model = language_model(LLAMA)
    plain, ids = twin_of(model), torch.randint(0, 32, (2, 5))
    before = {name: type(module) for name, module in model.named_modules()}
    accelerate(model)
    assert any(isinstance(module, LoRAMLP) for module in model.modules())
    assert restore(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: vars(module).keys() for name, module in plain.named_modules()
    }
    assert_same(results(model, ids), results(plain, ids), 0)
    assert not groups + as_one + alone


def test_layers_that_got_another_class_since(alone):
    """As fully_shard gives them."""
    plain, model = both()
    layer = model.base_model.model.up
    layer.__class__ = type("ShardedLinear", (type(layer),), {})
    restore(model)
    check(plain, model)
    assert len(alone) == 1
    assert accelerate(model).served == ["base_model.model.up", "base_model.model.down"]
    check(plain, model)
    assert len(alone) == 3


def test_restored_under_hooks_of_another_library():
    """As accelerate puts them around a forward that it found: what it found goes with the class."""
    model = language_model(LLAMA)
    plain, ids = twin_of(model), torch.randint(0, 32, (2, 5))
    accelerate(model)
    block = model.base_model.model.model.layers[0]
    for module in (block.self_attn, block.mlp, block.mlp.up_proj):
        add_hook_to_module(module, ModelHook())
    assert_same(results(model, ids), results(plain, ids), 1e-10)
    report = accelerate(model)
    assert report.kept == {"base_model.model.model.layers.0.mlp.up_proj": "it has a forward of its own"}
    assert_same(results(model, ids), results(plain, ids), 1e-10)
    restore(model)
    assert_same(results(model, ids), results(plain, ids), 0)


def test_accelerated_twice(groups, as_one):
    model = language_model(LLAMA)
    first, second = accelerate(model), accelerate(model)
    assert first == second
    results(model, torch.randint(0, 32, (2, 5)))
    assert groups == [3, 3]


def test_injected_into_a_model(alone):
    torch.manual_seed(0)
    model = Net().double()
    peft.inject_adapter_in_model(config_of(), model)
    randomised(model.double())
    wanted = results(model, x_of())
    assert accelerate(model).served == ["up", "down"]
    assert_same(results(model, x_of()), wanted, 1e-12)
    assert len(alone) == 2


def test_parameters_that_are_trained_and_counted():
    plain, model = both(bias="lora_only")
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()


def test_generated(groups, as_one):
    model = language_model(LLAMA).eval()
    plain = twin_of(model)
    accelerate(model)
    ids = torch.randint(3, 32, (2, 5))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got, wanted = (
                each.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
                for each in (model, plain)
            )
        assert torch.equal(got, wanted)
    results(model, ids)  # and gradients after that


def test_peft_forgets_the_norms_that_it_kept_before():
    helpers = pytest.importorskip("peft.helpers")
    model = net(use_dora=True).eval()
    with torch.no_grad(), helpers.DoraCaching():
        model(x_of())
    accelerate(model)
    with torch.no_grad():
        model(x_of())  # outside: PEFT would forget here
        model.base_model.model.up.lora_B["default"].weight.mul_(3)
    restore(model)
    with torch.no_grad():
        with helpers.DoraCaching():
            got = model(x_of())
        assert torch.equal(got, model(x_of()))
