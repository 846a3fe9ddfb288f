"""Tasks of seconds over a tiny Llama, and what each comes to by plain torch, alone and sequence by sequence."""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fused_lora import adapter_parameters
from fused_lora.modules.protocol import is_bank
from fused_lora.pretrain.llama import Llama, LlamaConfig
from fused_lora.tasks import Task

VOCABULARY = 61
LLAMA = LlamaConfig(32, 48, 2, 2, vocab_size=VOCABULARY)


def base(dtype=torch.float64):
    torch.manual_seed(0)
    return Llama(LLAMA).to(dtype).requires_grad_(False)


def sequences(seed, lengths, labelled=0.7):
    """Of which some tokens are to be learned."""
    generator = torch.Generator().manual_seed(seed)
    items = []
    for length in lengths:
        input_ids = torch.randint(VOCABULARY, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < labelled, input_ids, -100)
        items.append({"input_ids": input_ids, "labels": labels})
    return items


def config(r, targets="all-linear"):
    return {"r": r, "lora_alpha": 3.0 * r, "target_modules": targets}


def tasks(**changes):
    """Three that differ in all that they can; changes are of all of them."""
    each = [
        dict(name="a", data=sequences(1, (9, 5, 14, 7, 6)), config=config(4), steps=7, lr=1e-2, batch_size=2, seed=3),
        dict(name="b", data=sequences(2, (4, 12, 8)), config=config(6, ["q_proj", "down_proj"]), steps=4, lr=2e-2,
             accumulate=2, weight_decay=0.3, warmup=2, schedule="cosine", max_grad_norm=0.05, seed=4),
        dict(name="c", data=sequences(5, (11, 3, 3, 10), labelled=1.0), config=config(3), steps=9, lr=5e-3, seed=5,
             schedule="linear", max_grad_norm=None),
    ]  # fmt: skip
    return {one["name"]: Task(**(one | changes)) for one in each}


def factors(model, name):
    return [factor.detach().clone() for factor in adapter_parameters(model, name)]


def layers(model, name):
    """With the scale of each, in the order of factors."""
    return [
        (layer.removeprefix("base_model."), bank.adapters[name].scaling)
        for layer, bank in model.named_modules()
        if is_bank(bank) and name in bank.adapters
    ]


def near(one, other, tolerance=1e-11):
    return len(one) == len(other) and all(
        (a - b).abs().max().item() <= tolerance * max(1e-3, b.abs().max().item())
        for a, b in zip(one, other, strict=True)
    )


@dataclass
class Alone:
    """A task's run by W + s B A, whose factors begin as given: losses, norms and rates of its steps."""

    task: Task
    factors: list
    layers: list

    def __post_init__(self):
        self.model = base(self.factors[0].dtype)
        self.weights = dict(self.model.named_parameters())
        self.factors = [factor.clone().requires_grad_() for factor in self.factors]
        self.losses, self.norms, self.rates = [], [], []

    def loss(self, numbers):
        """The mean over all labelled tokens of these sequences, one after another."""
        weights = dict(self.weights)
        for (layer, scale), A, B in zip(self.layers, self.factors[::2], self.factors[1::2], strict=True):
            weights[f"{layer}.weight"] = weights[f"{layer}.weight"] + scale * B @ A
        summed, count = 0, 0
        for number in numbers:
            item = self.task.data[number]
            logits = torch.func.functional_call(self.model, weights, (item["input_ids"][None],))[0, :-1]
            labels = item["labels"][1:]
            summed = summed + F.cross_entropy(logits, labels, reduction="sum")
            count += (labels != -100).sum().item()
        return summed / count

    def rate(self, step):
        task = self.task
        done = (step - task.warmup) / (task.steps - task.warmup)
        if step < task.warmup:
            return task.lr * (step + 1) / task.warmup
        by_name = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        return task.lr * by_name[task.schedule]

    def run(self, steps=None, skipped=()):
        task = self.task
        optimizer = torch.optim.AdamW(self.factors, task.lr, weight_decay=task.weight_decay)
        for step in range(task.steps if steps is None else steps):
            optimizer.zero_grad()
            loss = self.loss(task.numbers(step))
            loss.backward()
            limit = math.inf if task.max_grad_norm is None else task.max_grad_norm
            self.norms.append(torch.nn.utils.clip_grad_norm_(self.factors, limit).item())
            self.losses.append(loss.item())
            self.rates.append(self.rate(step))
            for group in optimizer.param_groups:
                group["lr"] = self.rates[-1]
            if step not in skipped:
                optimizer.step()
        return self
