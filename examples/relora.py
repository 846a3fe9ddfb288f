"""ReLoRA in one page: a small LLaMA pretrained on Python's documentation, whole at first and then by restarts.

    python -m examples.relora

What `python -m fused_lora.pretrain` does with batches of tokens, checkpoints, logs and many GPUs around it.
ReLoRA: Lialin et al. 2023, arXiv:2307.05695.
"""

import torch

from fused_lora.pretrain.llama import Llama, LlamaConfig, next_token_loss
from fused_lora.pretrain.python_text import language_reference
from fused_lora.relora import ReLoRA, jagged_cosine_schedule

STEPS, WARM_START, RESET_EVERY = 240, 80, 40
BATCH_SIZE, SEQ_LEN = 8, 128


def main(steps: int = STEPS, warm_start: int = WARM_START, reset_every: int = RESET_EVERY) -> list[float]:
    """The loss of every step, in nats a byte."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.tensor(list(language_reference().encode()), device=device)
    model = Llama(LlamaConfig(128, 352, num_hidden_layers=2, num_attention_heads=4)).to(device)

    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    scheduler = jagged_cosine_schedule(
        optimizer,
        total_steps=steps,
        warmup_steps=warm_start // 4,
        restart_warmup_steps=reset_every // 8,
        reset_every=reset_every,
        warm_start_steps=warm_start,
    )
    relora = ReLoRA(
        model,
        optimizer,
        scheduler,
        reset_every=reset_every,
        warm_start_steps=warm_start,
        r=16,
        lora_alpha=32,
        target_modules=r".*(self_attn|mlp).*",
    )

    losses = []
    for step in range(1, steps + 1):
        starts = torch.randint(len(tokens) - SEQ_LEN, (BATCH_SIZE, 1), device=device)
        window = tokens[starts + torch.arange(SEQ_LEN + 1, device=device)]
        loss = next_token_loss(model(window[:, :-1]), window[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        zeroed = relora.step()  # steps the scheduler; wraps the model after the warm start; merges and restarts
        losses.append(loss.item())
        where = f"step {step}: loss {losses[-1]:.3f}"
        if step == warm_start:
            print(f"{where}; from here on {relora.report.replaced[0]} and the like have factors")
        elif zeroed:
            print(f"{where}; merged, restart {relora.cycle}, {zeroed['exp_avg']:.0%} forgotten")
    return losses


if __name__ == "__main__":
    main()
