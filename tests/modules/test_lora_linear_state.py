"""What a LoRALinear is, merged or not, goes with its weight; and it takes what nn.Linear takes."""

import copy
import io
import pickle

import accelerate
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_model, save_model
from torch import fx, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard

from fused_lora import LoRALinear, replace_linear
from tests.ranks import on_all_ranks

FLAG = "_extra_state"

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning", "ignore:torch.distributed is disabled"
)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 10), nn.Linear(10, 7)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def trained(merged=False, seed=0, dtype=torch.float32):
    """A net whose updates are not zero; lora_alpha / r is 5/3."""
    torch.manual_seed(seed)
    net = Net().to(dtype)
    for layer in replace_linear(net, 3, 5.0).layers(net):
        nn.init.normal_(layer.lora_B)
        if merged:
            layer.merge_()
    return net


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, LoRALinear)]


def inputs(dtype=torch.float32):
    return torch.randn(6, 12, dtype=dtype, generator=torch.Generator().manual_seed(1))


def copied(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def is_state(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


# merged


def by_load_state_dict(source, target, tmp_path):
    assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"


def by_assignment(source, target, tmp_path):
    target.load_state_dict(copied(source), assign=True)


def by_torch_save(source, target, tmp_path):
    kept = io.BytesIO()
    torch.save(source.state_dict(), kept)
    kept.seek(0)
    target.load_state_dict(torch.load(kept, weights_only=True))


def by_safetensors(source, target, tmp_path):
    save_model(source, str(tmp_path / "model.safetensors"))
    assert load_model(target, tmp_path / "model.safetensors") == (set(), [])


def by_distributed_checkpoint(source, target, tmp_path):
    dcp.save(get_model_state_dict(source), checkpoint_id=tmp_path)
    template = get_model_state_dict(target)
    dcp.load(template, checkpoint_id=tmp_path)
    set_model_state_dict(target, template)


def by_a_full_state_dict(source, target, tmp_path):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_model_state_dict(target, get_model_state_dict(source, options=options), options=options)


def by_a_cast_state_dict(source, target, tmp_path):
    target.load_state_dict({name: tensor.float() for name, tensor in source.state_dict().items()})


WAYS = [
    by_load_state_dict, by_assignment, by_torch_save, by_safetensors, by_distributed_checkpoint, by_a_full_state_dict,
    by_a_cast_state_dict,
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("into_merged", [True, False])
@pytest.mark.parametrize("from_merged", [True, False])
def test_merged_goes_with_the_weight(from_merged, into_merged, way, tmp_path):
    source, target = trained(from_merged), trained(into_merged, seed=1)
    way(source, target, tmp_path)
    assert [target.first.merged, target.second.merged] == [from_merged] * 2
    assert torch.equal(target(inputs()), source(inputs()))
    if from_merged:
        target.first.unmerge_()
        torch.testing.assert_close(target(inputs()), source(inputs()))


def test_from_meta():
    source = trained(merged=True)
    with torch.device("meta"):
        target = trained()
    target.load_state_dict(copied(source), assign=True)
    assert target.first.scale.device.type == "cpu"
    assert torch.equal(target(inputs()), source(inputs()))
    target.first.unmerge_()
    torch.testing.assert_close(target(inputs()), source(inputs()))


@pytest.mark.parametrize("merged", [True, False])
def test_from_pretrained(merged, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Adapted(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            replace_linear(self, 2, 3.0, exclude_modules=["lm_head"])

    model = Adapted(transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=50,
    )).eval()  # fmt: skip
    for layer in layers_of(model):
        nn.init.normal_(layer.lora_B)
        if merged:
            layer.merge_()
    model.save_pretrained(tmp_path)
    again, report = Adapted.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for layer in layers_of(again):
        assert layer.merged is merged
        layer.take_base()  # transformers thaws what it loads
    tokens = torch.arange(10)[None]
    assert torch.equal(again.eval()(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("merged", [True, False])
def test_a_checkpoint_from_before_merged_was_in_it(merged):
    source, target = trained(), trained(merged, seed=1)
    state = {name: tensor for name, tensor in source.state_dict().items() if FLAG not in name}
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(target(inputs()), source(inputs()))


@pytest.mark.parametrize("merged", [True, False])
def test_a_linears_checkpoint(merged):
    plain, target = Net(), trained(merged)
    missing, unexpected = target.load_state_dict(plain.state_dict(), strict=False)
    factors = {f"{layer}.{name}" for layer in ("first", "second") for name in ("lora_A", "lora_B")}
    assert (set(missing), unexpected) == (factors, [])
    for layer in (target.first, target.second):
        assert not layer.merged
        nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(target(inputs()), plain(inputs()))


@pytest.mark.parametrize("from_merged", [True, False])
def test_factors_alone(from_merged):
    """They are an update of whatever weight an unmerged layer has; what the file says of another weight is ignored."""
    source, target = trained(from_merged), trained(seed=1)
    weight = target.second.weight.clone()
    state = {name: tensor for name, tensor in source.state_dict().items() if "lora" in name or FLAG in name}
    target.load_state_dict(state, strict=False)
    assert not target.second.merged
    assert torch.equal(target.second.weight, weight)
    assert torch.equal(target.second.lora_A, source.second.lora_A)
    x = torch.randn(4, 10)
    update = 5 / 3 * x @ source.second.lora_A.T @ source.second.lora_B.T
    torch.testing.assert_close(target.second(x), nn.functional.linear(x, weight, target.second.bias) + update)


@pytest.mark.parametrize("names", [["lora_A", "lora_B"], ["lora_B"]], ids=str)
@pytest.mark.parametrize("assign", [True, False])
def test_factors_alone_are_refused_by_a_merged_layer(names, assign):
    target = trained(merged=True)
    before = copied(target)
    state = {f"second.{name}": tensor for name, tensor in trained(seed=1).second.state_dict().items() if name in names}
    with pytest.raises(RuntimeError, match=r"second: the layer's weight is merged.*unmerge_\(\) first"):
        target.load_state_dict(state, strict=False, assign=assign)
    assert is_state(target, before)


@pytest.mark.parametrize("merged", [True, False])
def test_a_merged_weight_without_its_factors_is_refused(merged):
    target = trained(merged, seed=1).second
    before = copied(target)
    state = trained(merged=True).second.state_dict()
    del state["lora_A"]
    with pytest.raises(RuntimeError, match=r"LoRALinear: the checkpoint's weight is merged.*got weight and lora_B"):
        target.load_state_dict(state, strict=False)
    assert is_state(target, before)


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bad", ["weight", "bias", "lora_B"])
def test_what_does_not_fit_leaves_the_layer_as_it_was(bad, assign):
    target = trained(seed=1)
    state = copied(trained(merged=True))
    state[f"second.{bad}"] = torch.zeros(5, 5)
    before = copied(target.second)
    with pytest.raises(RuntimeError, match=f"size mismatch for second.{bad}.*5, 5"):
        target.load_state_dict(state, assign=assign)
    assert is_state(target.second, before)
    state[f"second.{bad}"] = None
    with pytest.raises(RuntimeError, match=f"mismatch for second.{bad}: the checkpoint has NoneType"):
        target.load_state_dict(state, assign=assign)
    assert is_state(target.second, before)


@pytest.mark.parametrize("merged", [True, False])
def test_names_that_a_hook_changes(merged):
    source, target = trained(merged).second, trained(seed=1).second
    state = source.state_dict()
    state["kernel"] = state.pop("weight")
    if not merged:
        del state[FLAG]

    def rename(module, state, *_):
        state["weight"] = state.pop("kernel")

    target.register_load_state_dict_pre_hook(rename)
    target.load_state_dict(state)
    assert target.merged is merged
    x = torch.randn(4, 10)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("merged", [True, False])
def test_copies_and_pickles(merged):
    net = trained(merged)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert is_state(twin, net.state_dict())
        if not merged:
            twin.second.lora_alpha = 2.0
        assert net.second.scale.item() == pytest.approx(5 / 3)


def broadcast(rank):
    """From rank 0, which alone has a checkpoint of a merged net."""
    net = trained(seed=1)
    state = trained(merged=True).state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, state, options=options)
    return [net.first.merged, net.second.merged], net(inputs()).detach()


def sharded(rank, folder):
    """A checkpoint of a merged net, loaded into shards by FSDP2."""
    net, merged = trained(seed=1), trained(merged=True)
    for model in (net, merged):
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    for act in (net.first.merge_, merged.first.unmerge_, net.first.to_linear, merged.first.to_linear):
        with pytest.raises(TypeError, match="weight must be a plain tensor to be merged, got DTensor"):
            act()
    dcp.save(get_model_state_dict(merged), checkpoint_id=folder)
    template = get_model_state_dict(net)
    dcp.load(template, checkpoint_id=folder)
    set_model_state_dict(net, template)
    return [net.first.merged, net.second.merged], net(inputs()).detach()


def with_buffers_in_16_bits():
    """FSDP1 with a buffer_dtype, which is for rotary tables and not for a scale; and its whole state dict."""
    net = FullyShardedDataParallel(
        trained(), device_id=torch.device("cpu"), mixed_precision=MixedPrecision(buffer_dtype=torch.bfloat16),
        use_orig_params=True,
    )  # fmt: skip
    with torch.no_grad():
        y = net(inputs())
    net.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(net(inputs()), y)
    return [net.first.merged, net.second.merged], y


def steps(net, x, count=3):
    """Of AdamW, over what trains."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(count):
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_by_the_first_fsdp():
    """FSDP1, which lends weights as views of one flat parameter that requires gradients, trains what trains alone."""
    net, twin = trained(), trained()
    net = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=True)
    for model in (net, twin):
        steps(model, inputs())
    with FullyShardedDataParallel.summon_full_params(net):
        for name, parameter in twin.named_parameters():
            torch.testing.assert_close(net.module.get_parameter(name).data, parameter.data)


def on_ranks(rank, folder):
    trained_by_the_first_fsdp()
    return [broadcast(rank), sharded(rank, folder), with_buffers_in_16_bits()]


def test_on_several_ranks(tmp_path):
    for rank in on_all_ranks(on_ranks, tmp_path / "checkpoint", tmp_path / "ranks").values():
        for merged, (flags, y) in zip((True, True, False), rank, strict=True):
            assert flags == [merged] * 2
            torch.testing.assert_close(y, trained(merged)(inputs()).detach())


# factors that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
@pytest.mark.parametrize("act", ["merge_", "unmerge_", "to_linear"])
def test_a_factor_that_is_not_finite_is_not_merged(act, name, value):
    layer = trained(merged=act == "unmerge_").first
    with torch.no_grad():
        getattr(layer, name)[-1, -1] = value
    before = copied(layer)
    del before[name]
    with pytest.raises(ValueError, match=f"{name} must be finite"):
        getattr(layer, act)()
    after = layer.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_merging_under_compile():
    layer = trained().first
    want = layer(inputs())
    merge = torch.compile(lambda layer: layer.merge_(), backend="aot_eager")
    merge(layer)
    assert layer.merged
    torch.testing.assert_close(layer(inputs()), want)
    layer.unmerge_().lora_A.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="lora_A must be finite"):
        merge(layer)


@pytest.mark.parametrize("act", ["merge_", "unmerge_", "to_linear"])
@pytest.mark.parametrize("to_meta", [accelerate.cpu_offload, lambda net, device: net.to("meta")], ids=["offload", "to"])
def test_what_is_elsewhere_is_not_merged(act, to_meta):
    """Where the merge would be done to a tensor on meta, and the weight that is loaded for a forward stays."""
    net = trained(merged=act == "unmerge_")
    want = net(inputs()).detach()
    to_meta(net, torch.device("cpu"))
    with pytest.raises(ValueError, match="weight must be in memory to be merged, got one on meta"):
        getattr(net.first, act)()
    assert net.first.merged == (act == "unmerge_")
    if hasattr(net.first, "_hf_hook"):
        torch.testing.assert_close(net(inputs()).detach(), want)
        accelerate.hooks.remove_hook_from_submodules(net)
        getattr(net.first, act)()
        torch.testing.assert_close(net(inputs()).detach(), want)


@pytest.mark.gpu
def test_merging_in_a_cuda_graph():
    layer = trained().first.cuda()
    want = layer.weight + 5 / 3 * layer.lora_B @ layer.lora_A
    layer.merge_().unmerge_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.merge_()
    graph.replay()
    torch.testing.assert_close(layer.weight, want)


def test_factors_do_not_begin_anew_while_merged():
    layer = trained(merged=True).first
    before = copied(layer)
    with pytest.raises(RuntimeError, match="call unmerge_"):
        layer.reset_lora_parameters()
    assert is_state(layer, before)


# as nn.Linear is called


@pytest.mark.parametrize("merged", [True, False])
def test_input_by_its_name(merged):
    layer = trained(merged).first
    assert torch.equal(layer(input=inputs()), layer(inputs()))


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("keyword", [True, False])
def test_symbolic_trace_keeps_the_layer(merged, keyword):
    class Calls(Net):
        def forward(self, x):
            return self.second(input=torch.relu(self.first(x))) if keyword else super().forward(x)

    net = Calls()
    net.load_state_dict(Net().state_dict())
    replace_linear(net, 3, 5.0)
    net.load_state_dict(trained(merged).state_dict())
    traced = fx.symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert calls == ["first", "second"]
    assert isinstance(traced.second, LoRALinear)
    assert torch.equal(traced(inputs()), net(inputs()))
    if not merged:
        net.second.lora_alpha = 9.0
        assert torch.equal(traced(inputs()), net(inputs()))


def test_symbolic_trace_of_the_layer_alone():
    with pytest.raises(TypeError, match="trace a module that contains it"):
        fx.symbolic_trace(trained().first)
