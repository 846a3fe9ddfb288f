"""Modules that read a child's weight: such a child is left alone, and only such a child."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fused_lora import replace_linear
from fused_lora.modules.weight_readers import weight_readers

OPTIONS = dict(r=4, lora_alpha=6.0)


def names_of_read(model):
    readers = weight_readers(model)
    return {name for name, module in model.named_modules() if id(module) in readers}


class Home(nn.Module):
    """A parent of linears, of which subclasses read one or none."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 4)
        self.several = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.by_name = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
        self.inner = nn.Sequential(nn.Linear(4, 4))
        self.read.weight.data.mul_(2 * self.called.weight.abs().max())


class Functional(Home):
    def forward(self, x):
        return F.linear(self.called(x), self.read.weight, self.read.bias)


class Transposed(Home):
    def forward(self, x):
        return self.called(x) @ self.read.weight.T


class Loss(Home):
    def forward(self, x):
        return self.called(x)

    def loss(self, x):
        weight = self.read.weight
        return (self(x) @ weight).sum()


class LocalName(Home):
    def forward(self, x):
        layer, other = self.read, self.called
        return F.linear(other(x), layer.weight)


class Walrus(Home):
    def forward(self, x):
        if (layer := self.read) is not None:
            x = F.linear(x, layer.weight)
        return x


class Inherited(Functional):
    pass


class InProperty(Home):
    @property
    def matrix(self):
        return self.read.weight.float()


class Static(Home):
    @staticmethod
    def act(x):
        return x.weight

    @torch.no_grad()
    def forward(self, x):
        return self.called(x) * self.read.weight.sum()


class Loop(Home):
    def forward(self, x):
        for layer in self.several:
            x = F.linear(x, layer.weight)
        return x


class Enumerated(Home):
    def forward(self, x):
        for i, layer in enumerate(self.several):
            x = F.linear(x, layer.weight) * i
        return x


class Values(Home):
    def forward(self, x):
        return sum(layer.weight.sum() for layer in self.by_name.values()) * x


class Index(Home):
    def forward(self, x):
        return x @ self.by_name["second"].weight + x @ self.inner[0].weight


@pytest.mark.parametrize(("cls", "read"), [
    *((cls, {"read"}) for cls in (Functional, Transposed, Loss, LocalName, Walrus, Inherited, InProperty, Static)),
    *((cls, {"several.0", "several.1"}) for cls in (Loop, Enumerated)),
    (Values, {"by_name.first", "by_name.second"}),
    (Index, {"by_name.second", "inner.0"}),
])  # fmt: skip
def test_what_is_read(cls, read):
    # The local `other` of LocalName may stand for either of the two that are assigned together.
    assert names_of_read(cls()) == read | ({"called"} if cls is LocalName else set())
    wrapped = nn.Sequential(nn.ModuleDict({"block": cls()}))
    assert {name.removeprefix("0.block.") for name in names_of_read(wrapped)} >= read


class Metadata(Home):
    def forward(self, x):
        x = x.to(self.read.weight.dtype, device=self.read.weight.device)
        if isinstance(self.read.weight, torch.Tensor) and self.read.weight is not None:
            x = x[..., : self.read.weight.shape[1]]
        return self.read(x) - self.read.bias  # which no update changes


class Writing(Home):
    def reset_parameters(self):
        nn.init.xavier_uniform_(self.read.weight)
        self.read.weight.data.normal_()
        self.read.weight.mul_(2)
        self.read.weight[0] = 0
        self.read.weight = nn.Parameter(torch.ones(4, 4))
        nn.init.normal_(self.read.weight, std=0.02)


class Own(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight)


class NormOnly(Home):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        return self.norm.weight * self.read(x)


@pytest.mark.parametrize("cls", [Home, Metadata, Writing, NormOnly])
def test_what_is_not_read(cls):
    assert names_of_read(cls()) <= {"norm"}


def test_a_linears_own_forward_is_none_of_the_kind():
    assert names_of_read(nn.Sequential(Own(4, 4), nn.Linear(4, 4))) == set()


def test_a_forward_put_on_an_instance():
    model = Home()
    model.forward = Functional.forward.__get__(model)
    assert names_of_read(model) == {"read"}


def test_without_its_source_only_what_a_method_names():
    namespace = {"nn": nn, "F": F, "Home": Home}
    exec(
        "class Unseen(Home):\n"
        "    def forward(self, x):\n"
        "        return F.linear(x, self.read.weight)\n"
        "    def other(self, x):\n"
        "        return self.called(x)\n",
        namespace,
    )
    assert names_of_read(namespace["Unseen"]()) == {"read"}


def test_a_home_made_module():
    model = nn.Sequential(Functional())
    report = replace_linear(model, **OPTIONS)
    assert set(report.skipped) == {"0.read"}
    assert report.skipped["0.read"] == "Functional.forward reads its weight, which would leave the update out"
    report = replace_linear(nn.Sequential(Functional()), target_modules=["read", "called"], **OPTIONS)
    assert report.replaced == ["0.called"]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("make", [
    lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True),
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2),
    lambda: nn.ModuleList([nn.MultiheadAttention(16, 2, batch_first=True)]),
], ids=["layer", "encoder", "attention"])  # fmt: skip
def test_torchs_attention(make):
    """out_proj is read in every mode, linear1 and linear2 by the fast path of evaluation."""
    model = nn.ModuleDict({"torch": make(), "head": nn.Linear(16, 16), "own": nn.Linear(16, 16)}).eval()
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["own"]
    linears = {name for name, module in model["torch"].named_modules(prefix="torch") if isinstance(module, nn.Linear)}
    assert linears <= set(report.skipped)
    read = [reason for name, reason in report.skipped.items() if name.endswith(("linear1", "linear2"))]
    assert all("reads its weight" in reason for reason in read)


def test_what_is_replaced_in_torchs_decoder_takes_part_in_evaluation():
    """A decoder has no fast path: its linears are called, and the update shows in every mode."""
    model = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == ["linear1", "linear2"]
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 3, 16)
    for layer in report.layers(model):
        nn.init.normal_(layer.lora_B)
    outputs = []
    for training in (True, False):
        with torch.no_grad():
            outputs.append(model.train(training)(x, memory))
    for layer in report.layers(model):
        layer.merge_()
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(model(x, memory), outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("default")
def test_a_mamba():
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0)
    model = transformers.MambaForCausalLM(config)
    ids = torch.randint(50, (2, 7))
    report = replace_linear(model, **OPTIONS)
    assert report.replaced == [f"backbone.layers.{i}.mixer.in_proj" for i in range(2)]
    assert "reads its weight" in report.skipped["backbone.layers.0.mixer.dt_proj"]
    for layer in report.layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    merged = copy.deepcopy(model)
    for layer in report.layers(merged):
        layer.merge_()
    torch.testing.assert_close(model(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)


def test_what_no_forward_comes_to_does_not_count():
    """As methods that prepare a model for something else, whose callers know what they do."""

    class Prepared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.q(x) + self.helped(x)

        def helped(self, x):
            return x @ self.k.weight.T

        @torch.no_grad()
        def join(self):
            return torch.cat([self.q.weight, self.k.weight])

    model = Prepared()
    assert weight_readers(model) == {id(model.k): "Prepared.helped"}
