"""LoRABank layers on a GPU, by csrc's kernels where there are some: whole models, graphs, checkpoints, groups."""

import copy

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from fused_lora import adapter_parameters, add_adapter, choices, explain, route
from fused_lora.modules import LoRAMLP
from fused_lora.modules.siblings import LoRASiblings
from fused_lora.pretrain.llama import MLP, LlamaConfig
from tests.modules.blocks import Block

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:.*Profiler clears events")]
K, T = 264, 96
NAMES = ("a", "b", "c")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(K) for _ in range(2))
        self.checkpoints = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoints else block(x)
        return x


def make(dtype=torch.bfloat16):
    torch.manual_seed(0)
    model = Model().to("cuda", dtype)
    for i, name in enumerate(NAMES):
        targets = ["q", "k", "v", "out"] if name != "c" else ["q", "out"]  # c is not in all banks
        add_adapter(model, name, 4 + 20 * i, 3.0 + i, target_modules=targets)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2 if "lora" in name else K**-0.5)
    return model


def batch(dtype=torch.bfloat16):
    return torch.randn(4, T, K, device="cuda", generator=torch.Generator("cuda").manual_seed(1)).to(dtype)


ROUTE = ["a", ("a", "b"), "__base__", "c"]


def step(model, x, names=ROUTE):
    """y and the gradients of all factors, None for those without."""
    parameters = [parameter for name in NAMES for parameter in adapter_parameters(model, name)]
    with route(model, names):
        y = model(x)
    return y, torch.autograd.grad(y.float().square().sum(), parameters, allow_unused=True)


def near(got, want, tolerance=3e-2):
    return ((got.double() - want.double()).norm() / (want.double().norm() + 1e-30)).item() < tolerance


def test_a_model_computes_as_in_float64():
    model, x = make(), batch()
    y, grads = step(model, x)
    exact = copy.deepcopy(model).cpu().double()
    want_y, want_grads = step(exact, x.cpu().double())
    assert near(y.cpu(), want_y)
    for one, other in zip(grads, want_grads, strict=True):
        assert near(one.cpu(), other)


@pytest.mark.usefixtures("on_hopper")
def test_siblings_are_one_launch_of_the_kernels():
    model, x = make(), batch()
    assert "cuda (3 adapters, each row by its own)" in str(explain(model, tokens=4 * T))
    assert isinstance(model.blocks[0], LoRASiblings)
    step(model, x)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step(model, x)
        torch.cuda.synchronize()
    launches = [event for event in trace.events() if "lora_linear_kernel" in event.name]
    assert len(launches) == 2 * (2 + 2)  # of 2 blocks: q, k, v as one and out, forward and backward


@pytest.mark.usefixtures("on_hopper")
def test_gated_mlps_are_two_launches_each_way():
    if (reason := choices.gated_segments_obstacle(torch.device("cuda", 0), 64, False)) is not None:
        pytest.skip(reason)
    torch.manual_seed(0)
    mlp, x = MLP(LlamaConfig(K, 520, 1, 2)).to("cuda", torch.bfloat16), batch()
    for i, name in enumerate(NAMES):
        add_adapter(mlp, name, 4 + 20 * i, 3.0 + i)
    with torch.no_grad():
        for name, parameter in mlp.named_parameters():
            parameter.normal_(std=0.2 if "lora" in name else K**-0.5)
    assert isinstance(mlp, LoRAMLP)
    assert explain(mlp).fused.startswith("act(gate) up is made")
    y, grads = step(mlp, x)
    want_y, want_grads = step(copy.deepcopy(mlp).cpu().double(), x.cpu().double())
    assert near(y.cpu(), want_y)
    for one, other in zip(grads, want_grads, strict=True):
        assert near(one.cpu(), other)
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        step(mlp, x)
        torch.cuda.synchronize()
    assert len([event for event in trace.events() if "lora_linear_kernel" in event.name]) == 4


def test_checkpoints_have_the_route_of_their_forward():
    model, x = make(), batch()
    _, want = step(model, x)
    model.checkpoints = True
    parameters = [parameter for name in NAMES for parameter in adapter_parameters(model, name)]
    with route(model, ROUTE):
        y = model(x)
    with route(model, "b"):
        grads = torch.autograd.grad(y.float().square().sum(), parameters, allow_unused=True)
    for one, other in zip(grads, want, strict=True):
        assert torch.equal(one, other)


def test_a_graph_of_a_training_step_replays_other_divisions():
    model, x = make(), batch().flatten(0, 1)
    parameters = [parameter for name in NAMES for parameter in adapter_parameters(model, name)]
    names, M = ["a", "__base__", "b", "c"], len(x)
    routed = route(model, names, rows=[M // 4] * 4)

    def run():
        with routed:
            y = model(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), parameters)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        got = run()
    for rows in ([M // 4] * 4, [M, 0, 0, 0], [1, 2, M - 10, 3], [0, 5, 0, 100]):
        routed.divide(rows)
        for result in got:
            result.fill_(float("nan"))
        graph.replay()
        with route(model, names, rows=rows):
            y = model(x)
        want = [y.detach(), *torch.autograd.grad(y.float().square().sum(), parameters)]
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


def test_a_step_of_one_adapter_changes_no_other():
    model, x = make(), batch()
    others = {name: [p.detach().clone() for p in adapter_parameters(model, name)] for name in ("b", "c")}
    optimizer = torch.optim.AdamW(adapter_parameters(model, "a"), lr=0.1, fused=True)
    with route(model, ROUTE):
        model(x).float().square().sum().backward()
    optimizer.step()
    for name, values in others.items():
        assert all(map(torch.equal, adapter_parameters(model, name), values))


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 64])
def test_few_rows_each_by_its_own(rows):
    """As many rows as generation has."""
    model = make()
    names = [(*NAMES, "__base__", ("a", "b"))[i % 5] for i in range(rows)]
    x = torch.randn(rows, K, device="cuda").bfloat16()
    with torch.no_grad(), route(model, names):
        y = model(x)
    exact = copy.deepcopy(model).cpu().double()
    with torch.no_grad(), route(exact, names):
        want = exact(x.cpu().double())
    for i in range(rows):
        assert near(y[i].cpu(), want[i]), names[i]
