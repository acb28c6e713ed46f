"""Every parameter has one optimiser, and Muon's are the matrices of the layers."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny
from training.optimizers import muon_and_adamw, set_lr


def names_of(net: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    names = {id(p): name for name, p in net.named_parameters()}
    return {names[id(p)] for group in optimizer.param_groups for p in group["params"]}


def test_each_parameter_is_moved_by_one_optimiser_and_matrices_of_layers_by_muon() -> None:
    net = tiny.net()
    muon, adamw = (names_of(net, optimizer) for optimizer in muon_and_adamw(net, 1e-3, 0.1))
    assert not muon & adamw
    assert muon | adamw == {name for name, _ in net.named_parameters()}
    assert "encoder.layers.0.feed_forward1.linear1.weight" in muon
    assert "encoder.layers.0.self_attn.linear_pos.weight" in muon
    outside = ("pos_bias_u", "norm_out.weight", "depthwise_conv.weight", "embed.weight", "pre_encode.out.weight")
    assert not [name for name in muon if name.endswith(outside)]


def test_the_order_is_that_of_the_network_so_that_a_stored_state_fits() -> None:
    net = tiny.net()
    order = {id(p): i for i, p in enumerate(net.parameters())}
    for optimizer in muon_and_adamw(net, 1e-3, 0.1):
        for group in optimizer.param_groups:
            places = [order[id(p)] for p in group["params"]]
            assert places == sorted(places)


def test_biases_and_norms_are_not_decayed() -> None:
    net = tiny.net()
    _, adamw = muon_and_adamw(net, 1e-3, 0.1)
    decayed, others = adamw.param_groups
    assert decayed["weight_decay"] == 0.1 and all(p.dim() > 1 for p in decayed["params"])
    assert others["weight_decay"] == 0.0 and all(p.dim() == 1 for p in others["params"])


def test_the_learning_rate_reaches_every_group() -> None:
    optimizers = muon_and_adamw(tiny.net(), 1e-3, 0.1)
    set_lr(optimizers, 0.25)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups] == [0.25] * 3
