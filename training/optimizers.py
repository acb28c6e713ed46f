"""The optimisers of every recipe that trains from the start."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def muon_and_adamw(net: nn.Module, lr: float, weight_decay: float) -> list[Optimizer]:
    """Muon for the matrices of the layers (Jordan et al. 2024; Liu et al., arXiv 2502.16982, §2), AdamW for the rest.

    Muon's steps are scaled to the size of AdamW's, so that both have one learning rate.

    Args:
        net: Its layers' parameters have ``.layers.`` in their names.
        lr: Learning rate, above 0.
        weight_decay: Of what has two dimensions or more, from 0.
    """
    named = dict(net.named_parameters())
    matrices = [name for name, p in named.items() if p.dim() == 2 and ".layers." in name and name.endswith("weight")]
    others = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    muon = Muon([named[x] for x in matrices], lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)]


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    """Gives all groups of all optimisers a learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
