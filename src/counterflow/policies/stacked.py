"""Many MLPs as one: seeds and ensemble members are a batch dimension of every product, not a Python loop.

The variants are those of the official offline-RL code (methods' networks must agree with it to rounding):

    norm "none"    [Dense, gelu] x depth, Dense                    RQL's actor, FQL's actors
    norm "after"   [Dense, gelu, LayerNorm] x depth, Dense         RQL's and FQL's value networks
    norm "before"  [Dense, LayerNorm, gelu] x depth, Dense         QGF (its policy: not on the last hidden layer)

gelu is the tanh approximation; another activation may stand in its place (the online learners'). Layer norms have an epsilon of
1e-6 and their own scale and offset, as in flax.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.checks import COUNT, check_name

Norm = Literal["none", "after", "before"]
Activation = Literal["gelu", "tanh", "relu", "elu"]
EPSILON = 1e-6


class StackedMLP(nn.Module):
    """N independent MLPs, evaluated together.

    Args:
        inputs: I.
        outputs: O.
        count: N, seeds times members.
        width: neurons of a hidden layer, or of each of them.
        depth: hidden layers; not read where `width` says each.
        norm: where layer norms stand, see the top of this file.
        norm_last: whether the last hidden layer has one.
        activation: "gelu" (the offline learners'), "tanh" (DSRL's), "relu" or "elu".

    Raises:
        InvalidInputError: a size is not positive.
        UnknownNameError: no such norm or activation.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        count: int = 1,
        width: int | Sequence[int] = 512,
        depth: int = 4,
        norm: Norm = "none",
        *,
        norm_last: bool = True,
        activation: Activation = "gelu",
    ) -> None:
        hidden = [width] * depth if isinstance(width, int) else list(width)
        for name, value in (("inputs", inputs), ("outputs", outputs), ("count", count), ("hidden layers", len(hidden))):
            COUNT.check(f"{name} of stacked MLPs", value)
        COUNT.check("the smallest hidden layer of stacked MLPs", min(hidden))
        check_name("norm", norm, Norm)
        check_name("activation", activation, Activation)
        super().__init__()
        self.inputs, self.outputs, self.count, self.hidden = inputs, outputs, count, tuple(hidden)
        self.norm, self.activation = norm, activation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise([inputs, *hidden, outputs]):
            self.weights.append(nn.Parameter(torch.empty(count, before, after)))
            self.biases.append(nn.Parameter(torch.zeros(count, 1, after)))
        normed = [] if norm == "none" else hidden if norm_last else hidden[:-1]
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(count, 1, size)) for size in normed)
        self.offsets = nn.ParameterList(nn.Parameter(torch.zeros(count, 1, size)) for size in normed)
        self.reset()

    @torch.no_grad()
    def reset(self, generators: Sequence[torch.Generator] | None = None) -> None:
        """Draw the weights anew: uniform with variance 2 / (inputs + outputs), as flax's variance_scaling(1, fan_avg, uniform).

        Args:
            generators: one a seed, on the CPU; each draws the N / S networks of its seed, which lie together. None: torch's
                global one draws all.
        """
        for weight in self.weights:
            bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
            if generators is None:
                weight.uniform_(-bound, bound)
                continue
            share = self.count // len(generators)
            parts = [torch.empty(share, *weight.shape[1:]).uniform_(-bound, bound, generator=one) for one in generators]
            weight.copy_(torch.cat(parts))

    def forward(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """Map (N, B, I), each network's own batch, to (N, B, O).

        Args:
            inputs: (N, B, I).
            frozen: let gradients reach the inputs, but not the parameters.
        """

        def own(parameters: nn.ParameterList) -> list[Tensor]:
            return [one.detach() if frozen else one for one in parameters]

        weights, biases, scales, offsets = own(self.weights), own(self.biases), own(self.scales), own(self.offsets)
        hidden = inputs
        for layer in range(len(self.hidden)):
            hidden = torch.baddbmm(biases[layer], hidden, weights[layer])
            normed = layer < len(scales)
            if normed and self.norm == "before":
                hidden = _layer_norm(hidden, scales[layer], offsets[layer])
            hidden = _activate(hidden, self.activation)
            if normed and self.norm == "after":
                hidden = _layer_norm(hidden, scales[layer], offsets[layer])
        return torch.baddbmm(biases[-1], hidden, weights[-1])

    def ensemble(self, inputs: Tensor, *, frozen: bool = False) -> Tensor:
        """Map (S, B, I), one batch a seed, to (S, M, B, O): every seed's batch through its M = N / S members."""
        seeds, rows, size = inputs.shape
        members = self.count // seeds
        wide = inputs[:, None].expand(seeds, members, rows, size).reshape(self.count, rows, size)
        outputs: Tensor = self(wide, frozen=frozen)
        return outputs.view(seeds, members, rows, -1)

    def part(self, first: int, count: int) -> StackedMLP:
        """Return networks `first` to `first + count` as a stack of their own, copied, without gradients."""
        norm_last = len(self.scales) == len(self.hidden) or self.norm == "none"
        part = StackedMLP(
            self.inputs,
            self.outputs,
            count,
            self.hidden,
            norm=self.norm,
            norm_last=norm_last,
            activation=self.activation,
        )
        part.load_state_dict({name: value[first : first + count] for name, value in self.state_dict().items()})
        return part.requires_grad_(False)

    def folded(self, constants: Sequence[float]) -> StackedMLP:
        """Return a copy, without gradients, whose last inputs are fixed: what they contribute has become part of the bias."""
        count = len(constants)
        network = StackedMLP(
            self.inputs - count,
            self.outputs,
            self.count,
            self.hidden,
            norm=self.norm,
            norm_last=len(self.scales) == len(self.hidden) or self.norm == "none",
            activation=self.activation,
        )
        state = {name: value.detach().clone() for name, value in self.state_dict().items()}
        weight = state["weights.0"]
        fixed = torch.tensor(list(constants), dtype=weight.dtype, device=weight.device)
        state["biases.0"] += torch.einsum("i,nio->no", fixed, weight[:, self.inputs - count :])[:, None]
        state["weights.0"] = weight[:, : self.inputs - count].contiguous()
        network.load_state_dict(state)
        return network.to(weight.device).requires_grad_(False)


def _activate(hidden: Tensor, activation: Activation) -> Tensor:
    if activation == "gelu":
        return functional.gelu(hidden, approximate="tanh")
    if activation == "tanh":
        return torch.tanh(hidden)
    return functional.relu(hidden) if activation == "relu" else functional.elu(hidden)


def _layer_norm(hidden: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    normed = functional.layer_norm(hidden, hidden.shape[-1:], eps=EPSILON)
    return normed * scale + offset
