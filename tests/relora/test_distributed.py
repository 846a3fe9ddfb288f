"""Two ranks whose torch generators differ: after every merge they hold the same weights, or shards of them."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import padding, replace_linear
from fused_lora.formats import FP8, INT8, NF4
from fused_lora.relora import ReLoRA
from fused_lora.relora.shards import whole
from tests.ranks import RANKS, on_all_ranks
from tests.relora.test_controller import Net
from tests.relora.test_stored import OverCodes

OPTIONS = {"reset_mode": "random", "reset_ratio": 0.5, "precision": "stochastic"}
LORA = {"r": 3, "exclude_modules": ["head"]}


def inputs(step, rank=0):
    return torch.randn(8, 12, generator=torch.Generator().manual_seed(10 * step + rank))


def replicated(rank, ddp):
    """The weights after each step of a training by DDP, or by all_reduce by hand."""
    net = Net().bfloat16()
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    relora = ReLoRA(net, optimizer, reset_every=3, warm_start_steps=2, **OPTIONS, **LORA)
    states = []
    model = None
    for step in range(8):
        if model is None or step == 2:  # a reducer holds the parameters it was made with
            model = DistributedDataParallel(net) if ddp else net
        model(inputs(step, rank).bfloat16()).float().square().mean().backward()
        if not ddp:
            for parameter in net.parameters():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
        optimizer.step()
        optimizer.zero_grad()
        relora.step()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    return states


def with_padded_rows(rank, padded):
    """Weights and losses of a converted net under DDP, which begins with rank 0's weights everywhere."""
    net = Net().bfloat16()
    replace_linear(net, 3, 5.0, exclude_modules=["head"])
    for layer in (net.attn, net.mlp):
        data = layer.weight.data
        layer.weight.data = padding.empty(*data.shape, data).copy_(data) if padded else data
        if rank > 0:
            layer.weight.data.zero_()
    model = DistributedDataParallel(net, gradient_as_bucket_view=True)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    losses = []
    for step in range(4):
        with model.no_sync():
            model(inputs(step, rank).bfloat16()).float().square().mean().backward()
        loss = model(inputs(10 + step, rank).bfloat16()).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(layer.weight.is_contiguous() != padded for layer in (net.attn, net.mlp))
    return losses, {name: value.clone() for name, value in net.state_dict().items()}


def sharded(rank, shards):
    """The same, by FSDP2 or on one rank; whole weights."""
    net = Net()
    replace_linear(net, 3, 5.0, exclude_modules=["head"])
    if shards:
        mesh = init_device_mesh("cpu", (RANKS,))
        fully_shard(net.mlp, mesh=mesh)
        fully_shard(net, mesh=mesh)
    torch.manual_seed(100 + rank)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    relora = ReLoRA(net, optimizer, reset_every=3, reset_mode="zero", **LORA)
    states = []
    for step in range(8):
        net(inputs(step)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            net(inputs(step))  # leaves parameters whole, and is no reason not to restart
        relora.step()
        states.append({name: whole(value).clone() for name, value in net.state_dict().items()})
    if shards:
        with pytest.raises(RuntimeError, match="model is sharded, and its layers cannot be exchanged"):
            relora.finish()
    return states


@pytest.mark.parametrize("ddp", [True, False], ids=["ddp", "all_reduce"])
def test_ranks_stay_together(ddp, tmp_path):
    states = on_all_ranks(replicated, ddp, tmp_path)
    for step, (first, second) in enumerate(zip(states[0], states[1], strict=True)):
        for name, value in first.items():
            assert torch.equal(value, second[name]), f"{name} after step {step}"
    for before, after in zip(states[0][4:7], states[0][5:8], strict=True):
        assert any(not torch.equal(before[name], after[name]) for name in after)


def test_padded_rows_under_ddp(tmp_path):
    padded, dense = (on_all_ranks(with_padded_rows, pads, tmp_path / str(pads)) for pads in (True, False))
    for rank in range(RANKS):
        assert padded[rank][0] == dense[rank][0]
        for name, value in dense[0][1].items():
            assert torch.equal(padded[rank][1][name], value), name
        assert padded[rank][1]["attn.weight"].any()


def test_shards_are_those_of_one_rank(tmp_path):
    """r = 3 on two ranks: the shards of A are of different sizes."""
    states = on_all_ranks(sharded, True, tmp_path)
    torch.manual_seed(0)
    for step, (alone, *ranks) in enumerate(zip(sharded(0, False), states[0], states[1], strict=True)):
        for name, value in alone.items():
            for rank in ranks:
                torch.testing.assert_close(rank[name], value, msg=lambda m, at=(name, step): f"{at}: {m}")


def test_shards_come_after_the_layers(tmp_path):
    messages = on_all_ranks(refused, None, tmp_path)
    assert all("call replace_linear before fully_shard" in message for message in messages.values())


def over_codes(rank, form):
    """Bits of all, with residuals, at the end of a training by DDP; of FP8, which gloo does not move, by hand."""
    found = []
    for precision in ("auto", "stochastic", "nearest"):
        run = OverCodes(form, torch.bfloat16, precision=precision, reset_mode="random", reset_ratio=0.5)
        torch.manual_seed(100 + rank)
        model = run.net if isinstance(form, FP8) else DistributedDataParallel(run.net)
        for step in range(7):
            model(inputs(step, rank).bfloat16()).float().square().mean().backward()
            for parameter in model.parameters() if model is run.net else ():
                if parameter.grad is not None:
                    dist.all_reduce(parameter.grad)
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.relora.step()
        found.append({name: each for name, (each, _) in run.everything().items()})
        assert run.relora.cycle == 2
        shares = [each.share for each in run.relora.arrived.values()]
        found.append({"shares": torch.tensor(shares)})
    return found


@pytest.mark.parametrize("form", [FP8("rows"), INT8(), NF4(nested=True)], ids=str)
def test_ranks_stay_together_over_codes(form, tmp_path):
    first, second = on_all_ranks(over_codes, form, tmp_path).values()
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert {"first low", "second low"} <= set(first[0])
    assert not torch.equal(first[0]["first.weight"], first[2]["first.weight"])


def sharded_codes(rank, _):
    run_of = OverCodes(NF4()).net
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(run_of, mesh=mesh)
    with pytest.raises(NotImplementedError) as error:
        ReLoRA(run_of, torch.optim.AdamW([p for p in run_of.parameters() if p.requires_grad]), reset_every=3)
    return str(error.value)


def test_shards_of_codes_are_refused(tmp_path):
    messages = on_all_ranks(sharded_codes, None, tmp_path)
    assert all(message.startswith("first.weight is quantised and in shards") for message in messages.values())


def refused(rank, _):
    net = Net()
    fully_shard(net, mesh=init_device_mesh("cpu", (RANKS,)))
    with pytest.raises(ValueError) as error:  # noqa: PT011
        ReLoRA(net, torch.optim.AdamW(net.parameters()), reset_every=3, **LORA)
    return str(error.value)
