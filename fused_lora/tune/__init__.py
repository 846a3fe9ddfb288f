"""Which backend is the fastest for a LoRA linear on the card at hand: measured, and remembered for later calls."""
