"""Layers that are computed together by csrc's kernels: in threads, on streams, in graphs, offloaded, compiled."""

import copy
import threading

import pytest
import torch
from torch import nn

from fused_lora import backends, replace_linear
from fused_lora.modules import siblings
from fused_lora.pretrain.llama import Llama, LlamaConfig
from tests.modules.threads import at_once

pytestmark = pytest.mark.gpu


@pytest.fixture
def groups(monkeypatch):
    """How many parts each group had; skips where csrc's kernels do not run."""
    if backends.choose_lora_linear(torch.device("cuda", 0), torch.bfloat16, 8).name != "cuda":
        pytest.skip("csrc's kernels do not run here")
    seen, real = [], siblings.ops.lora_group
    monkeypatch.setattr(siblings.ops, "lora_group", lambda x, parts, p: (seen.append(len(parts)), real(x, parts, p))[1])
    return seen


def make_pair():
    """A small LLaMA in bfloat16, its layers one by one and together."""
    torch.manual_seed(0)
    alone = Llama(LlamaConfig(64, 136, 2, 2, 96)).to("cuda", torch.bfloat16)
    together = copy.deepcopy(alone)
    for model, fuse in ((alone, "off"), (together, "auto")):
        torch.manual_seed(1)
        for layer in replace_linear(model, 8, 16, fuse=fuse).layers(model):
            nn.init.normal_(layer.lora_B, std=0.05)
    return alone, together


def tokens(rows=4):
    return torch.randint(96, (rows, 33), device="cuda")


def close(got, wanted):
    torch.testing.assert_close(got, wanted, atol=5e-2, rtol=5e-2)


def test_together_as_alone(groups):
    alone, together = make_pair()
    x = tokens()
    ours, theirs = together(x), alone(x)
    close(ours, theirs)
    assert groups == [3, 3]
    ours.float().square().mean().backward()
    theirs.float().square().mean().backward()
    for (name, one), other in zip(together.named_parameters(), alone.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, atol=2e-2 * other.grad.abs().max().item(), rtol=0.1)


@pytest.mark.parametrize("streams", [False, True])
def test_threads(streams, groups):
    _, together = make_pair()
    inputs = [tokens(n) for n in (1, 2, 4, 7)]
    with torch.no_grad():
        wanted = [together(x) for x in inputs]
    torch.cuda.synchronize()
    wrong, start = [], threading.Barrier(len(inputs))

    def serve(x, y):
        with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream() if streams else torch.cuda.default_stream()):
            start.wait()
            for _ in range(200):
                try:
                    if not torch.equal(together(x), y):
                        wrong.append("value")
                except Exception as error:
                    wrong.append(error)

    at_once(serve, inputs, wanted)
    assert not wrong


def test_training_in_threads(groups):
    """Backward passes run on autograd's own threads."""
    _, together = make_pair()
    x = tokens()

    def gradients(model):
        factors = [p for p in model.parameters() if p.requires_grad]
        return torch.autograd.grad(model(x).float().square().mean(), factors)

    wanted, found = gradients(together), []
    at_once(lambda model: found.append(gradients(model)), [together] * 4)
    assert len(found) == 4
    for grads in found:
        assert all(torch.equal(one, other) for one, other in zip(grads, wanted, strict=True))


def test_a_captured_graph(groups):
    _, together = make_pair()
    x = tokens()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        for _ in range(3):
            together(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        y = together(x)
    x.copy_(tokens())
    for layer in together.modules():
        if hasattr(layer, "lora_alpha"):
            layer.lora_alpha = 3.0  # in place, so that the graph sees it
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, together(x))


def test_layers_offloaded_by_accelerate(groups):
    accelerate = pytest.importorskip("accelerate")
    alone, together = make_pair()
    x = tokens()
    with torch.no_grad():
        wanted = alone(x)
        accelerate.cpu_offload(together, execution_device=torch.device("cuda", 0))
        close(together(x), wanted)
    assert not groups


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores", "ignore:.*Function'> should not be instantiated")
def test_compiled(groups):
    torch._dynamo.reset()
    alone, together = make_pair()
    compiled = torch.compile(together, fullgraph=True)
    for n in (4, 4, 2):
        x = tokens(n)
        close(compiled(x), alone(x))
    compiled(x).float().mean().backward()


def test_streams_by_their_handles(groups):
    """Handles are used again; each stream has flags of its own all the same."""
    _, together = make_pair()
    x = tokens()
    with torch.no_grad():
        wanted = together(x)
        for _ in range(64):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            external = torch.cuda.ExternalStream(stream.cuda_stream)
            with torch.cuda.stream(external):
                y = together(x)
            external.synchronize()
            assert torch.equal(y, wanted)
