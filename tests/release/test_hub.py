"""The folder for the kernels hub: loaded beside the installed package, layers swapped in, the same results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fused_lora
from fused_lora.reference import lora_linear_ref

kernels = pytest.importorskip("kernels")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A kernel's module, from a folder made for nobody's GPU."""
    if not (ROOT / "fused_lora").is_dir():
        pytest.skip("is made from the sources")
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, "-m", "release.hub", "--universal", "--out", str(folder / "build")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    return folder, kernels.get_local_kernel(folder)


class Layer(nn.Module):
    """Somebody's own LoRA layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(7, 5), requires_grad=False)
        self.bias = nn.Parameter(torch.randn(7), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, 5)), nn.Parameter(torch.randn(7, 3))
        self.scaling, self.lora_dropout = 0.75, 0.5

    def forward(self, x):
        return lora_linear_ref(x, self.weight, self.lora_A, self.lora_B, self.bias, self.scaling)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = Layer(), Layer(), Layer()
        self.gate_proj.lora_dropout = nn.Dropout(0.5)
        self.down_proj.weight = nn.Parameter(torch.randn(5, 7), requires_grad=False)
        self.down_proj.bias = None
        self.down_proj.lora_A, self.down_proj.lora_B = nn.Parameter(torch.randn(2, 7)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


def test_its_ops_are_its_own(loaded):
    _, module = loaded
    assert module.__name__.startswith("_fused_lora_universal_")
    assert module.ops.library.NAMESPACE == module.__name__ != fused_lora.ops.library.NAMESPACE
    assert hasattr(getattr(torch.ops, module.__name__), "lora_parts_forward")
    x, layer = torch.randn(4, 5), Layer()
    arguments = x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, layer.scaling
    torch.testing.assert_close(module.lora_linear(*arguments), fused_lora.lora_linear(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize(("plain", "name"), [(Layer, "LoRALinear"), (GatedMLP, "LoRAGatedMLP")])
def test_a_model_is_kernelized(plain, name, loaded):
    folder, module = loaded
    marked = kernels.use_kernel_forward_from_hub(name)(type(plain.__name__, (plain,), {}))
    model = nn.Sequential(marked()).double().eval()
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    want = model(x)
    trained = [x, *(each for each in model.parameters() if each.requires_grad)]
    want_grads = torch.autograd.grad(want.square().sum(), trained)
    repository = kernels.LocalLayerRepository(repo_path=folder, layer_name=name)
    with kernels.use_kernel_mapping({name: {"cpu": repository}}):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu", use_fallback=False)
    assert model[0].forward.__func__ is getattr(module.layers, name).forward
    got = model(x)
    torch.testing.assert_close(got, want)
    for grad, expected in zip(torch.autograd.grad(got.square().sum(), trained), want_grads, strict=True):
        torch.testing.assert_close(grad, expected)
    assert not torch.equal(model.train()(x), got), "drops in training"
