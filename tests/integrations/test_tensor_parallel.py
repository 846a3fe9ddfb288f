"""Two ranks that each hold a part of every layer: the values and gradients of one process."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn import functional as F

from fused_lora import LoRALinear, explain, replace_linear
from fused_lora.integrations.tensor_parallel import ColwiseLoRA, RowwiseLoRA
from fused_lora.modules import protocol
from fused_lora.relora import ReLoRA
from tests.ranks import RANKS, on_all_ranks

K, N, ROWS = 13, 11, 6  # columns are cut into 7 and 6, and into 6 and 5
WHOLE = {"gate": ColwiseLoRA(), "up": ColwiseLoRA(), "down": RowwiseLoRA()}
BY_ROWS = {  # each rank has rows of what lies between the layers
    "gate": ColwiseLoRA(input_layouts=Shard(0)), "up": ColwiseLoRA(input_layouts=Shard(0)),
    "down": RowwiseLoRA(output_layouts=Shard(0)),
}  # fmt: skip
WHOLE_BETWEEN = {
    "gate": ColwiseLoRA(output_layouts=Replicate()), "up": ColwiseLoRA(output_layouts=Replicate()),
    "down": RowwiseLoRA(input_layouts=Replicate()),
}  # fmt: skip
DTENSORS = {
    "gate": ColwiseLoRA(use_local_output=False), "up": ColwiseLoRA(use_local_output=False), "down": RowwiseLoRA(),
}  # fmt: skip
CASES = {
    "plain": (WHOLE, {}),
    "by rows": (BY_ROWS, {}),
    "whole between the layers": (WHOLE_BETWEEN, {}),
    "DTensors between them": (DTENSORS, {}),
    "DoRA": (WHOLE, {"use_dora": True}),
    "biases that train": (WHOLE, {"train_bias": True}),
    "DoRA, biases that train": (WHOLE, {"use_dora": True, "train_bias": True}),
    "not all replaced": (WHOLE, {"exclude_modules": ["up"]}),
    "merged": (WHOLE, {}),
    "fully_shard": (WHOLE, {"use_dora": True, "train_bias": True}),
}


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(K, N), nn.Linear(K, N), nn.Linear(N, K)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def make(**options):
    torch.manual_seed(0)
    model = nn.Sequential(MLP()).double()
    replace_linear(model, 3, 5.0, **options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "magnitude" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def results(model, x):
    """Gradients as the optimizer gets them, and whole."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y.sin() * y).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert getattr(parameter.grad, "placements", None) == getattr(parameter, "placements", None), name
            found[name] = whole(parameter.grad)
    return found


def inputs():
    return torch.randn(ROWS, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def prepared(case):
    plan, options = CASES[case]
    model = make(**options)
    if case == "merged":
        for layer in model[0].children():
            layer.merge_()
    return plan, model


def in_parts(rank, _):
    protocol.obstacle = lambda *args: None  # what could be computed together would be
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    found = {}
    for case in CASES:
        plan, model = prepared(case)
        parallelize_module(model[0], mesh["tensor"], plan)
        if case == "fully_shard":
            fully_shard(model[0], mesh=mesh["data"])
        by_rows = plan is BY_ROWS
        x = inputs().chunk(RANKS)[rank] if by_rows else inputs()
        found[case] = results(model, x)
        assert len(found[case]["y"]) == (ROWS // RANKS if by_rows else ROWS)
    return found


def test_values_and_gradients(tmp_path):
    ranks = on_all_ranks(in_parts, None, tmp_path)
    for case, (plan, _) in CASES.items():
        alone = results(prepared(case)[1], inputs())
        assert len(alone) > 2 or case == "merged"
        for rank in range(RANKS):
            got = ranks[rank][case]
            assert got.keys() == alone.keys(), case
            for name, want in alone.items():
                if plan is BY_ROWS and name in ("y", "dx"):
                    want = want.chunk(RANKS)[rank]
                where = f"{case}, {name}"
                torch.testing.assert_close(got[name], want, msg=lambda m, where=where: f"{where}: {m}")


def dropping(rank, _):
    """Outputs of ranks whose generators differ, and of a rowwise layer what was dropped on ranks where they agree."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make(lora_dropout=0.4)
    parallelize_module(model[0], mesh, {"gate": ColwiseLoRA(output_layouts=Replicate()), "down": RowwiseLoRA()})
    torch.manual_seed(100 + rank)
    columns = model[0].gate(inputs())
    torch.manual_seed(7)
    model[0].down.lora_A.data.to_local().fill_(1.0)
    x = torch.ones(64, N, dtype=torch.float64).tensor_split([6], 1)[rank].requires_grad_()
    dx = torch.autograd.grad(model[0].down(x).sum(), x)[0]
    return columns.detach(), dx - dx.min()


def test_dropout(tmp_path):
    ranks = on_all_ranks(dropping, None, tmp_path)
    layer = make(lora_dropout=0.4)[0].gate
    torch.manual_seed(100)
    wanted = layer(inputs()).detach()
    for columns, _ in ranks.values():
        torch.testing.assert_close(columns, wanted)
    masks = [dx[:, :5] > dx[:, :5].mean() for _, dx in ranks.values()]
    assert not torch.equal(*masks)


def as_a_module(rank, _):
    """What else is done with a model that is cut."""
    mesh = init_device_mesh("cpu", (RANKS,))
    model = make()
    parallelize_module(model[0], mesh, WHOLE)
    layer = model[0].gate
    assert isinstance(layer, LoRALinear)
    assert not isinstance(layer, nn.Linear)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in model.named_parameters())
    assert "in shards" in str(explain(model))
    with pytest.raises(TypeError, match="weight must be a plain tensor to be merged"):
        layer.merge_()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs()), model(inputs()))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    refused(mesh, model, optimizer)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def refused(mesh, model, optimizer):
    with pytest.raises(ValueError, match="must be sharded by rows"):
        ReLoRA(model, optimizer, reset_every=3)
    by_hand = make()
    distribute_module(by_hand, mesh)
    with pytest.raises(TypeError, match="weight must be a plain tensor, got a DTensor: ColwiseLoRA and RowwiseLoRA"):
        by_hand(inputs())
    with pytest.raises(ValueError, match="replace_linear comes before fully_shard and parallelize_module"):
        replace_linear(parallelize_module(MLP(), mesh, WHOLE), 3, 5.0)


def test_trained_and_saved(tmp_path):
    ranks = on_all_ranks(as_a_module, None, tmp_path)
    model = make()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for state in ranks.values():
        torch.testing.assert_close(dict(state), dict(model.state_dict()))
        make().load_state_dict(state)
