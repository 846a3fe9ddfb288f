"""The options of ReLoRA that are its own, and what has to hold of them."""

from .. import checks
from .optimizer_reset import MODES

BASES = ("trained", "zero", "absent")
PRECISIONS = ("auto", "residual", "stochastic", "nearest")
RESIDUAL_DEVICES = ("weight", "cpu")
# The options of the layers, which replace_linear takes too.
LORA = ("r", "lora_alpha", "target_modules", "exclude_modules", "lora_dropout", "lora_dtype", "train_bias")


def check_options(
    reset_every, warm_start_steps, lr_factor, precision, residual_device, base, reset_mode, reset_ratio, seed
) -> None:
    """Raises ValueError or TypeError naming the argument."""
    if reset_every is not None:
        checks.check_count("reset_every", reset_every, least=1)
    checks.check_count("warm_start_steps", warm_start_steps)
    checks.check_count("seed", seed)
    checks.check_scale("lr_factor", lr_factor)
    checks.check_probability("reset_ratio", reset_ratio)
    for name, value, known in (
        ("precision", precision, PRECISIONS),
        ("residual_device", residual_device, RESIDUAL_DEVICES),
        ("base", base, BASES),
        ("reset_mode", reset_mode, MODES),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if base != "trained" and warm_start_steps > 0:
        raise ValueError(f"base={base!r} forgets the weights: a warm start would be for nothing")
    if base == "absent" and reset_every is not None:
        raise ValueError("base='absent' has no weights to merge into: reset_every must be None")
