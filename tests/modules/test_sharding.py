"""Two ranks by FSDP2 and DDP: the gradients of one process, with layers together wherever their tensors are whole."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from fused_lora import LoRALinear, explain, replace_linear
from fused_lora.relora import ReLoRA
from tests.ranks import RANKS, on_all_ranks

pytest.importorskip("transformers")
from tests.modules.language_model import FUSED, adapted, base, grads, watched

# transformers warns of its own affairs.
pytestmark = pytest.mark.filterwarnings("default")

ALONE = "it has hooks"
NOW = "it is in shards now"


def by_layer(block):
    return [layer for layer in block.modules() if isinstance(layer, (LoRALinear, nn.Linear))]


def q_k_v(block):
    return [[block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]]


# What of each block is sharded by itself, beside the whole model; what is computed together then; what explain says.
SHARDED = {
    "each layer": (by_layer, [], ALONE),
    "q, k and v at once": (q_k_v, ["mlp"] * 2, NOW),
    "some layers": (lambda block: [block.self_attn.k_proj, block.mlp.down_proj], [2, 2], NOW),  # gate and up
    "each block": (lambda block: [block], FUSED, NOW),
    "the whole": (lambda block: [], FUSED, NOW),
}  # fmt: skip
OPTIONS = {"lora": {}, "dora": {"use_dora": True}, "trained biases": {"train_bias": True}}


def sharded(rank, _):
    seen, mesh = watched(), init_device_mesh("cpu", (RANKS,))
    found = {}
    for name, options in OPTIONS.items():
        for how, (modules, together, word) in SHARDED.items():
            if options and how not in ("each layer", "each block"):
                continue
            model = adapted(**options)
            for block in model.model.layers:
                for module in modules(block):
                    fully_shard(module, mesh=mesh)
            fully_shard(model, mesh=mesh)
            assert word in (said := str(explain(model, tokens=18))), f"{name}, {how}: {said}"
            with torch.no_grad():
                grad_free = model(input_ids=torch.ones(1, 4, dtype=torch.long)).logits
            seen.clear()
            found[name, how] = grads(model)
            assert seen == together, f"{name}, {how}: {seen}"
            assert grad_free.isfinite().all()
    refused(mesh)
    return found


def refused(mesh):
    dora = fully_shard(adapted(use_dora=True), mesh=mesh)
    with pytest.raises(ValueError, match="is DoRA"):
        ReLoRA(dora, torch.optim.AdamW(dora.parameters()), reset_every=3)
    for modules, _, _ in SHARDED.values():
        model = base()
        for block in model.model.layers:
            for module in modules(block):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="replace_linear comes before fully_shard and parallelize_module"):
            replace_linear(model, 3, 5.0)


def test_fsdp2(tmp_path):
    ranks = on_all_ranks(sharded, None, tmp_path)
    for (name, how), got in ranks[0].items():
        wanted = grads(adapted(**OPTIONS[name]))
        for rank in (got, ranks[1][name, how]):
            torch.testing.assert_close(rank, wanted, msg=lambda m, at=f"{name}, {how}": f"{at}: {m}")


CHECKPOINTED = {"reentrant": True, "not reentrant": False}
WRAPPED = {
    "plain": {},
    "gradients in buckets": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
}


def replicated(rank, _):
    seen, found = watched(), {}
    for how, options in WRAPPED.items():
        for checkpointed in (None, *CHECKPOINTED):
            if checkpointed == "reentrant" and how == "unused parameters":
                continue  # torch refuses it of any model
            model = adapted()
            if checkpointed:
                model.gradient_checkpointing_enable({"use_reentrant": CHECKPOINTED[checkpointed]})
                model.enable_input_require_grads()
            model = DistributedDataParallel(model.train(), **options)
            for step in range(2):
                seen.clear()
                found[how, checkpointed, step] = grads(model, seed=10 * step + rank)
                assert seen[:4] == FUSED, f"{how}, {checkpointed}: {seen}"
    return found


def test_ddp(tmp_path):
    """Each rank has tokens of its own, and the mean of both gradients."""
    ranks = on_all_ranks(replicated, None, tmp_path)
    model, wanted = adapted(), {}
    for step in range(2):
        each = [grads(model, seed=10 * step + rank) for rank in range(RANKS)]
        wanted[step] = {name: (each[0][name] + each[1][name]) / 2 for name in each[0]}
    for rank in range(RANKS):
        for (*how, step), got in ranks[rank].items():
            torch.testing.assert_close(got, wanted[step], msg=lambda m, at=how: f"{at}: {m}")
