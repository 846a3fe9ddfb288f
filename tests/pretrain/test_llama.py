"""The demo's LLaMA: shapes, causality, and rotary positions against complex numbers."""

import torch
from torch import nn

from fused_lora.pretrain.llama import Llama, LlamaConfig, apply_rotary, rotary_tables

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=61)


def test_logits_for_every_token():
    logits = Llama(CONFIG)(torch.randint(61, (3, 7)))
    assert logits.shape == (3, 7, 61)
    assert logits.isfinite().all()


def test_a_later_token_changes_no_earlier_logits():
    model = Llama(CONFIG)
    tokens = torch.randint(60, (1, 12))
    changed = tokens.clone()
    changed[0, 8] = 60
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :8], after[:, :8])
    assert (before[:, 8:] - after[:, 8:]).abs().amax(-1).min() > 1e-4


def test_the_order_of_earlier_tokens_matters():
    model = Llama(CONFIG)
    logits = model(torch.tensor([[3, 4, 5, 6], [5, 4, 3, 6]]))
    assert (logits[0, -1] - logits[1, -1]).abs().max() > 1e-4


def test_rotary_is_a_complex_rotation():
    x = torch.randn(9, CONFIG.head_dim)
    half = CONFIG.head_dim // 2
    angles = [[position * CONFIG.rope_theta ** (-i / half) for i in range(half)] for position in range(9)]
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(9, half), torch.tensor(angles))
    rotated = apply_rotary(x, *rotary_tables(9, CONFIG, x.device, x.dtype))
    torch.testing.assert_close(rotated, torch.cat((turned.real, turned.imag), dim=-1))


def test_rotary_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, CONFIG.head_dim)
    cos, sin = rotary_tables(20, CONFIG, q.device, q.dtype)
    scores = apply_rotary(q.expand(20, -1), cos, sin) @ apply_rotary(k.expand(20, -1), cos, sin).T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1])


def test_every_projection_is_a_plain_linear():
    linears = [name for name, module in Llama(CONFIG).named_modules() if type(module) is nn.Linear]
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    assert len(linears) == 7 * CONFIG.num_hidden_layers + 1
    assert {name.split(".")[-1] for name in linears} == set(names)
