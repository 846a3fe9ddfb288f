"""Codes and scales stay what they are, bit by bit, wherever a layer goes; and no other format is loaded into it."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, load_model, save_file, save_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fused_lora import explain, replace_linear
from fused_lora.formats import FP8, NF4
from tests.modules.bases import (
    FORMATS,
    Net,
    assert_same,
    base_state,
    bits,
    every_format,
    net,
    trained,
    with_every_byte,
)
from tests.ranks import on_all_ranks

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def every_byte(form, seed=0, dtype=torch.float32):
    return with_every_byte(net(form, seed, dtype))


# casts and moves

CASTS = {
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.float16), torch.float16),
    "to and move": (lambda model: model.to("cpu", torch.bfloat16), torch.bfloat16),
    "double": (lambda model: model.double(), torch.float64),
    "type": (lambda model: model.type(torch.float16), torch.float16),
    "back": (lambda model: model.half().float(), torch.float32),
}


@every_format
@pytest.mark.parametrize("cast", CASTS)
def test_casts(cast, form):
    """bitsandbytes 1971: an offset took the model's dtype."""
    model = every_byte(form)
    before, tensors = base_state(model), [model.first.weight, model.first.weight_scale]
    act, dtype = CASTS[cast]
    act(model)
    assert_same(before, base_state(model))
    assert all(one is other for one, other in zip(tensors, (model.first.weight, model.first.weight_scale), strict=True))
    for layer in model.children():
        assert {layer.compute_dtype, layer.lora_A.dtype, layer.bias.dtype} == {dtype}
        assert layer.weight_scale.dtype is (torch.uint8 if form == NF4(nested=True) else torch.float32)
    if dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert net(form).to(dtype)(torch.randn(3, 70, dtype=dtype)).dtype is dtype


@every_format
def test_another_kind_of_parameters(form):
    """Where torch makes new parameters instead of giving old ones new data."""
    model = every_byte(form)
    before = base_state(model)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.half()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert_same(before, base_state(model))


@every_format
def test_meta_and_back(form):
    model = every_byte(form)
    before, state, x = base_state(model), copied(model), torch.randn(3, 70)
    y = model(x)
    model.to("meta")
    assert {each.device.type for each in model.parameters()} == {"meta"}
    assert model(x.to("meta")).shape == y.shape
    model.to_empty(device="cpu")
    assert {name: each.dtype for name, each in model.state_dict().items()} == {
        name: each.dtype for name, each in state.items()
    }
    model.load_state_dict(state)
    assert_same(before, base_state(model))
    torch.testing.assert_close(model(x), y, equal_nan=True)


@every_format
def test_made_on_meta(form):
    with torch.device("meta"):
        model = Net()
    replace_linear(model, 3, 5.0, base=form)
    source = every_byte(form)
    model.load_state_dict(copied(source), assign=True)
    assert_same(base_state(source), base_state(model))
    assert not any(each.requires_grad for name, each in model.named_parameters() if "weight" in name)
    assert model.first.scale.device.type == "cpu"


@pytest.mark.gpu
@every_format
def test_there_and_back(form):
    """bitsandbytes 937, 1664 and 1527: quantised anew, or left behind."""
    model = every_byte(form)
    before = base_state(model)
    for place in (lambda m: m.cuda(), lambda m: m.to("cuda", torch.float16)):
        model = place(model)
        assert {each.device.type for each in (*model.parameters(), model.first.scale)} == {"cuda"}
        assert_same(before, base_state(model))
        model = model.cpu()
        assert {each.device.type for each in (*model.parameters(), model.first.scale)} == {"cpu"}
        assert_same(before, base_state(model))


@every_format
@pytest.mark.parametrize(
    "copying", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), lambda model: saved(model)]
)
def test_copies(copying, form):
    model = every_byte(form)
    for source in (model, model.first):
        twin = copying(source)
        assert_same(base_state(source), base_state(twin))
    assert (twin.base, twin.compute_dtype) == (form, torch.float32)
    x = torch.randn(4, 70)
    torch.testing.assert_close(twin(x), model.first(x), equal_nan=True)
    assert twin.weight.data_ptr() != model.first.weight.data_ptr()
    twin.to("meta")
    assert not model.first.weight.is_meta


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_format
def test_offloaded(form):
    model, x = net(form), torch.randn(4, 70)
    before, y = base_state(model), model(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert model.first.weight.is_meta
    torch.testing.assert_close(model(x), y)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert_same(before, base_state(model))


# state dicts


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def by_load_state_dict(source, target, folder):
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"


def by_assignment(source, target, folder):
    target.load_state_dict(copied(source), assign=True)


def by_torch_save(source, target, folder):
    torch.save(source.state_dict(), folder / "state")
    target.load_state_dict(torch.load(folder / "state", weights_only=True))


def by_safetensors(source, target, folder):
    save_model(source, str(folder / "model.safetensors"))
    assert load_model(target, folder / "model.safetensors") == (set(), [])


def by_a_file_of_safetensors(source, target, folder):
    save_file(source.state_dict(), folder / "model.safetensors")
    target.load_state_dict(load_file(folder / "model.safetensors"), assign=True)


def by_distributed_checkpoint(source, target, folder):
    dcp.save(get_model_state_dict(source), checkpoint_id=folder)
    template = get_model_state_dict(target)
    dcp.load(template, checkpoint_id=folder)
    set_model_state_dict(target, template)


WAYS = [
    by_load_state_dict, by_assignment, by_torch_save, by_safetensors, by_a_file_of_safetensors,
    by_distributed_checkpoint,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@every_format
def test_saved_and_loaded(form, way, tmp_path):
    """bitsandbytes 1946: what the codes mean was saved and not loaded."""
    source, target = every_byte(form), net(form, seed=1)
    way(source, target, tmp_path)
    assert_same(base_state(source), base_state(target))
    x = torch.randn(4, 70)
    torch.testing.assert_close(target(x), source(x), equal_nan=True)
    assert not target.first.weight_scale.requires_grad


PAIRS = [(one, other) for one in (*FORMATS, None) for other in (*FORMATS, None) if one != other]
ALIKE = {FP8("rows"), FP8("rows", powers=True)}  # whose tensors are


@pytest.mark.parametrize(("mine", "theirs"), [pair for pair in PAIRS if set(pair) != ALIKE], ids=str)
def test_another_format_is_refused(mine, theirs):
    """Also where shapes are the same, and not all names are asked for."""
    for strict in (True, False):
        for assign in (True, False):
            target, source = net(mine), net(theirs, seed=1)
            before = copied(target.first)
            with pytest.raises(RuntimeError, match=r"first: the checkpoint has weight .*, the layer") as error:
                target.load_state_dict(source.state_dict(), strict=strict, assign=assign)
            assert str(error.value).count("first: ") == 1
            if mine is not None:
                assert f"the layer of base {mine.name} weight" in str(error.value)
            assert_same(
                {name: (bits(each), each.dtype) for name, each in before.items()},
                {name: (bits(each), each.dtype) for name, each in target.first.state_dict().items()},
            )


@every_format
@pytest.mark.parametrize("K", [64, 130])
def test_another_shape_is_refused(K, form):
    target, source = trained(form), trained(form, K=K)
    before = base_state(target)
    with pytest.raises(RuntimeError, match="LoRALinear: the checkpoint has weight"):
        target.load_state_dict(source.state_dict())
    assert_same(before, base_state(target))


@every_format
@pytest.mark.parametrize("name", ["weight", "weight_scale"])
def test_half_of_a_weight_is_refused(name, form):
    target, state = trained(form), trained(form).state_dict()
    before = base_state(target)
    del state[name]
    with pytest.raises(RuntimeError, match=r"LoRALinear: the checkpoint has weight.*, the layer of base"):
        target.load_state_dict(state, strict=False)
    assert_same(before, base_state(target))


@every_format
def test_factors_alone(form):
    source, target = net(form, seed=1), net(form)
    before = base_state(target)
    state = {name: tensor for name, tensor in source.state_dict().items() if "lora" in name}
    target.load_state_dict(state, strict=False)
    assert_same(before, base_state(target))
    assert torch.equal(target.second.lora_A, source.second.lora_A)


def test_codes_that_were_cast_are_refused():
    """Of which a copy would look like codes again."""
    target = trained(FP8("rows"))
    state = {name: tensor.float() for name, tensor in target.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"the checkpoint has weight float32 \(33, 65\)"):
        target.load_state_dict(state)


# several processes


def forms_on_ranks():
    """What every rank makes alike, and what one process computes of it."""
    x = torch.randn(6, 70, generator=torch.Generator().manual_seed(1))
    for form in FORMATS:
        yield form, net(form), every_byte(form), x


def stepped(model, x):
    """Gradients, and factors after one step."""
    y = model(x)
    y.square().sum().backward()
    trains = [each for each in model.parameters() if each.requires_grad]
    grads = [whole(each.grad).clone() for each in trains]
    torch.optim.SGD(trains, lr=1e-4).step()
    return [y.detach(), *grads, *(whole(each.detach()).clone() for each in trains)]


def whole(tensor):
    """Of shards: as integers where they are of 8 bits, since gloo moves no such floats."""
    if not isinstance(tensor, DTensor):
        return tensor
    if tensor.dtype is not torch.float8_e4m3fn:
        return tensor.full_tensor()
    of, local = (tensor.device_mesh, tensor.placements), tensor.to_local().view(torch.uint8)
    return DTensor.from_local(local, *of, shape=tensor.shape, stride=tensor.stride()).full_tensor().view(tensor.dtype)


def shard(model, mesh, layers=True, **options):
    for layer in model.children() if layers else ():
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def of_shards(model):
    state = {name: whole(each) for name, each in model.state_dict().items() if "weight" in name}
    return {name: (bits(each).cpu(), each.dtype) for name, each in state.items()}


def sharded(rank, folder):
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for i, (form, model, bytes_, x) in enumerate(forms_on_ranks()):
        wanted = base_state(bytes_)
        shard(bytes_, mesh, layers=i % 2 == 0)
        assert "the frozen weight in" in str(explain(bytes_, tokens=4))
        bytes_(x)  # codes are gathered, and let go of
        for layer in bytes_.children():
            layer.reshard() if hasattr(layer, "reshard") else bytes_.reshard()
        bytes_.to(torch.bfloat16)
        assert bytes_.first.compute_dtype is torch.bfloat16
        assert_same(wanted, of_shards(bytes_))
        dcp.save(get_model_state_dict(bytes_), checkpoint_id=f"{folder}/{i}")
        other = shard(net(form, seed=2, dtype=torch.bfloat16), mesh)
        template = get_model_state_dict(other)
        dcp.load(template, checkpoint_id=f"{folder}/{i}")
        set_model_state_dict(other, template)
        assert_same(wanted, of_shards(other))
        if not isinstance(form, FP8):  # of which gloo moves no whole tensors
            full = get_model_state_dict(bytes_, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
            other = shard(net(form, seed=1, dtype=torch.bfloat16), mesh)
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_model_state_dict(other, full, options=options)
            assert_same(wanted, of_shards(other))
        found[i] = stepped(shard(model, mesh), x)
    return found


def test_fsdp2(tmp_path):
    """bitsandbytes 1945: bytes that stood for a NaN were changed on their way."""
    ranks = on_all_ranks(sharded, tmp_path / "checkpoints", tmp_path / "ranks")
    for i, (_, model, _, x) in enumerate(forms_on_ranks()):
        wanted = stepped(model, x)
        for rank in ranks.values():
            for one, other in zip(rank[i], wanted, strict=True):
                torch.testing.assert_close(one, other)


def cast_on_the_way(rank, _):
    mesh = init_device_mesh("cpu", (2,))
    for form in FORMATS:
        model = shard(net(form), mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
        with pytest.raises(TypeError, match=r"weight and its scales must stay .* param_dtype casts them"):
            model(torch.randn(6, 70))


def test_a_param_dtype_is_refused(tmp_path):
    on_all_ranks(cast_on_the_way, None, tmp_path)


def replicated(rank, _):
    """Gloo, unlike NCCL, sends no 8-bit floats: there all ranks begin alike by themselves."""
    return [
        stepped(DistributedDataParallel(model, init_sync=not isinstance(form, FP8)), x)
        for form, model, _, x in forms_on_ranks()
    ]


def test_ddp(tmp_path):
    for rank in on_all_ranks(replicated, None, tmp_path).values():
        for found, (_, model, _, x) in zip(rank, forms_on_ranks(), strict=True):
            for one, other in zip(found, stepped(model, x), strict=True):
                torch.testing.assert_close(one, other)
