"""How the learning rate goes in every recipe."""

from __future__ import annotations


def lr_scale(step: int, warmup_steps: int, steps: int, decay_steps: int) -> float:
    """Trapezoid: up over the warm-up, flat, down to zero over the last ``decay_steps``."""
    return max(0.0, min(1.0, (step + 1) / warmup_steps, (steps - step) / max(1, decay_steps)))
