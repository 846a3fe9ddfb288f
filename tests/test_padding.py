"""Rows at multiples of 128 bytes, and weights that move to them."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from fused_lora import LoRALinear, padding, replace_linear
from tests.accuracy import assert_accurate

gpu = pytest.mark.gpu


@pytest.mark.parametrize(
    ("cols", "expected"),
    [(1, 8), (8, 8), (151, 152), (1009, 1024), (2736, 2752), (5461, 5504), (5504, 5504), (50257, 50304)],
)
def test_few_columns_more_than_there_are(cols, expected):
    assert padding.padded(cols) == expected
    rows = padding.empty(3, cols, torch.zeros(1, dtype=torch.float16))
    assert rows.shape == (3, cols)
    assert rows.stride() == (expected, 1)
    assert rows.dtype is torch.float16


def test_on_a_cpu_rows_stay_where_they_are():
    weight = nn.Parameter(torch.zeros(4, 13, dtype=torch.bfloat16))
    data = weight.data_ptr()
    padding.pad_rows_(weight)
    assert weight.data_ptr() == data


def net(device="cuda", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 141), nn.Linear(141, 24), nn.Linear(24, 8)).to(device, dtype)


@gpu
def test_a_converted_weight_moves_and_is_the_same():
    model = net()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    objects = dict(model.named_parameters())
    replace_linear(model, r=4, lora_alpha=1.0)
    assert [layer.weight.stride(0) for layer in model] == [64, 144, 24]
    for name, parameter in model.named_parameters():
        if name in before:
            assert parameter is objects[name]
            assert torch.equal(parameter, before[name])


@gpu
def test_it_stays_so_through_what_happens_to_modules():
    model = net()
    replace_linear(model, r=4, lora_alpha=1.0)
    moved = copy.deepcopy(model).cpu().cuda()
    loaded = net()
    replace_linear(loaded, r=4, lora_alpha=1.0)
    loaded.load_state_dict(model.cpu().state_dict())
    assigned = net()
    replace_linear(assigned, r=4, lora_alpha=1.0)
    dense = {name: value.contiguous() for name, value in model.cuda().state_dict().items()}
    assigned.load_state_dict(dense, assign=True)
    assert assigned[1].weight.data_ptr() == dense["1.weight"].data_ptr(), "it is the dict's memory too"
    del dense
    assigned.to("cuda")
    kept = io.BytesIO()
    torch.save(model, kept)
    kept.seek(0)
    read = torch.load(kept, weights_only=False)
    for other in (moved, loaded, copy.deepcopy(loaded), assigned, read, model):
        assert other[1].weight.stride() == (144, 1)
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), moved.parameters(), strict=True))
    assert LoRALinear(141, 24, 4, device="cuda", dtype=torch.float16).weight.stride() == (144, 1)
    assert LoRALinear(141, 24, 4, device="cuda").weight.is_contiguous(), "float32 does not go through the copy engine"


@gpu
def test_dense_where_asked_for():
    model = net()
    replace_linear(model, r=4, lora_alpha=1.0, pad_rows=False)
    assert all(layer.weight.is_contiguous() for layer in copy.deepcopy(model).cpu().cuda())
    assert LoRALinear(141, 24, 4, device="cuda", dtype=torch.float16, pad_rows=False).weight.is_contiguous()
    assert LoRALinear.from_linear(net()[1], 4, pad_rows=False).weight.is_contiguous()


@gpu
def test_what_shares_its_memory_stays_where_it_is():
    whole = torch.randn(48, 141, device="cuda", dtype=torch.bfloat16)
    linear = nn.Linear(141, 24, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(whole[:24])
    assert LoRALinear.from_linear(linear, 4).weight.data_ptr() == whole.data_ptr()


@gpu
def test_what_is_tied_by_its_memory_stays_tied():
    embedding = nn.Embedding(24, 141, device="cuda", dtype=torch.bfloat16)
    linear = nn.Linear(141, 24, bias=False, device="meta", dtype=torch.bfloat16)
    linear.weight = nn.Parameter(embedding.weight.data)
    layer = LoRALinear.from_linear(linear, 4)
    assert layer.weight.data_ptr() == embedding.weight.data_ptr()
    assert layer.to("cuda").weight.data_ptr() == embedding.weight.data_ptr()


SHARING = {
    "tied": lambda weight: nn.Parameter(weight.data),
    "a view": lambda weight: weight.detach()[1:],
    "transposed": lambda weight: weight.detach().T,
    "another dtype": lambda weight: weight.detach().view(torch.int16),
    "a state dict": lambda weight: {"weight": weight.detach()},
    "dlpack": lambda weight: torch.utils.dlpack.to_dlpack(weight.detach()),
}


@pytest.mark.parametrize("share", SHARING.values(), ids=SHARING.keys())
def test_what_another_shares_is_not_alone(share):
    weight = nn.Parameter(torch.randn(4, 13, dtype=torch.bfloat16))
    assert padding.is_alone(weight)
    other = share(weight)
    assert not padding.is_alone(weight)
    del other
    assert padding.is_alone(weight)


def test_a_part_of_memory_is_not_alone():
    whole = torch.randn(8, 13)
    assert not padding.is_alone(whole[:4])
    assert not padding.is_alone(torch.randn(13, 8).T)
    part = torch.randn(8, 13)[:4]
    assert not padding.is_alone(part), "nothing else is there, but it would not move as it is"


def test_memory_that_another_library_reads_is_not_alone():
    assert not padding.is_alone(torch.from_numpy(np.zeros((4, 13), np.float32)))
    weight = torch.randn(4, 13)
    array = weight.numpy()
    assert not padding.is_alone(weight)
    assert array.shape == (4, 13)


WHEN_IT_MOVES = {
    "new": lambda layer: LoRALinear(13, 4, 2),
    "from_linear": lambda layer: LoRALinear.from_linear(nn.Linear(13, 4), 2),
    "replace_linear": lambda layer: replace_linear(nn.Sequential(nn.Linear(13, 4)), 2, lora_alpha=1.0),
    "deepcopy": lambda layer: copy.deepcopy(nn.Sequential(layer)),
    "cast": lambda layer: nn.Sequential(layer).to(torch.bfloat16),
    "to_empty": lambda layer: layer.to("meta").to_empty(device="cpu"),
    "load_state_dict": lambda layer: layer.load_state_dict(LoRALinear(13, 4, 2).state_dict()),
}


@pytest.mark.parametrize("act", WHEN_IT_MOVES.values(), ids=WHEN_IT_MOVES.keys())
def test_a_weight_is_alone_when_it_is_to_move(act, monkeypatch):
    """Else it would stay dense for good."""
    layer, found = LoRALinear(13, 4, 2), []
    monkeypatch.setattr(padding, "pad_rows_", lambda weight: found.append(padding.is_alone(weight)))
    act(layer)
    assert found[-1]


def test_an_assigned_weight_is_alone_when_the_dict_is_gone():
    layer, state = LoRALinear(13, 4, 2), LoRALinear(13, 4, 2).state_dict()
    layer.load_state_dict(state, assign=True)
    assert not padding.is_alone(layer.weight)
    del state
    assert padding.is_alone(layer.weight)


def test_a_layer_from_before_there_was_the_choice():
    layer = LoRALinear(13, 8, 4)
    del layer.__dict__["pads_rows"]
    again = copy.deepcopy(layer).to(torch.bfloat16)
    assert again.weight.dtype is torch.bfloat16


def test_not_by_default_where_a_process_group_is(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not LoRALinear(13, 8, 4).pads_rows
    assert LoRALinear(13, 8, 4, pad_rows=True).pads_rows


@gpu
def test_merged_in_place_with_nothing_written_beyond_the_rows():
    model = net()
    replace_linear(model, r=4, lora_alpha=1.0)
    layer = model[1]
    nn.init.normal_(layer.lora_B)
    whole = layer.weight.data.as_strided((24, 144), (144, 1))
    whole[:, 141:] = 7
    exact = layer.weight.double() + layer.scale.double() * layer.lora_B.double() @ layer.lora_A.double()
    plain = torch.addmm(layer.weight.contiguous(), layer.lora_B, layer.lora_A, alpha=layer.scale.item())
    layer.merge_()
    assert_accurate("weight", layer.weight.detach(), exact, plain)
    assert (whole[:, 141:] == 7).all()
