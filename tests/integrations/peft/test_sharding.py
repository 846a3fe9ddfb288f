"""An accelerated PeftModel in shards, replicated and offloaded: PEFT's gradients, by the kernels where all is whole."""

import accelerate as hugging_face_accelerate
import pytest
import torch
from peft.tuners.lora import Linear
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora.integrations.peft import accelerate
from tests.modules.language_model import FUSED, base, grads, tokens, watched
from tests.ranks import RANKS, on_all_ranks

from .models import adapted, config_of

# These libraries warn of their own affairs.
pytestmark = pytest.mark.filterwarnings("default")


def make(fast=True):
    model = adapted(base(), config_of(target_modules="all-linear"))
    if fast:
        accelerate(model)
    return model


def layers_of(block):
    return [module for module in block.modules() if isinstance(module, Linear)]


# What of each block is sharded by itself, beside the whole model, and what is computed together then.
SHARDED = {
    "each layer": (layers_of, []),
    "bases alone": (lambda block: [layer.base_layer for layer in layers_of(block)], []),
    "each block": (lambda block: [block], FUSED),
}


def on_ranks(rank, _):
    seen, mesh, found = watched(), init_device_mesh("cpu", (RANKS,)), {}
    for how, (modules, together) in SHARDED.items():
        model = make()
        for block in model.base_model.model.model.layers:
            for module in modules(block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        seen.clear()
        found[how] = grads(model)
        assert seen == together, f"{how}: {seen}"
    seen.clear()
    found["replicated"] = grads(DistributedDataParallel(make(), static_graph=True))
    assert seen == FUSED
    return found


def test_on_several_ranks(tmp_path):
    wanted = grads(make(fast=False))
    for rank in on_all_ranks(on_ranks, None, tmp_path).values():
        for how, got in rank.items():
            torch.testing.assert_close(got, wanted, msg=lambda m, how=how: f"{how}: {m}")


def test_offloaded(groups, as_one):
    wanted = make(fast=False)(tokens()).logits
    for whole_blocks in (False, True):
        options = {"preload_module_classes": ["LlamaDecoderLayer"]} if whole_blocks else {}
        model = hugging_face_accelerate.cpu_offload(make(), execution_device=torch.device("cpu"), **options)
        torch.testing.assert_close(model(tokens()).logits, wanted)
        assert (len(groups), len(as_one)) == ((2, 2) if whole_blocks else (0, 0))
