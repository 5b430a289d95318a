"""An ensemble of MLPs as one network: the members are a batch dimension of every product, not a Python loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.checks import COUNT


class EnsembleMLP(nn.Module):
    """M independent MLPs with GELU and layer norm, evaluated together.

    Args:
        inputs: I.
        outputs: O.
        members: M.
        width: neurons of a hidden layer.
        depth: hidden layers.

    Raises:
        InvalidInputError: a size is not positive.
    """

    def __init__(self, inputs: int, outputs: int, members: int = 1, width: int = 256, depth: int = 2) -> None:
        for name, value in (
            ("inputs", inputs),
            ("outputs", outputs),
            ("members", members),
            ("width", width),
            ("depth", depth),
        ):
            COUNT.check(f"{name} of an ensemble of MLPs", value)
        super().__init__()
        self.members, self.width, self.depth = members, width, depth
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for before, after in pairwise([inputs, *[width] * depth, outputs]):
            bound = 1 / math.sqrt(before)  # torch.nn.Linear's own law
            self.weights.append(nn.Parameter(torch.empty(members, before, after).uniform_(-bound, bound)))
            self.biases.append(nn.Parameter(torch.empty(members, 1, after).uniform_(-bound, bound)))

    def forward(self, inputs: Tensor, masks: Sequence[Tensor] = ()) -> Tensor:
        """Map (M, B, I) to (M, B, O).

        Args:
            inputs: (M, B, I), each member's own batch (expand one batch to give all members the same).
            masks: for each hidden layer, (M, B, W), what its output is multiplied by (dropout); none: nothing.
        """
        hidden = inputs
        for layer in range(self.depth):
            hidden = torch.baddbmm(self.biases[layer], hidden, self.weights[layer])
            hidden = functional.gelu(functional.layer_norm(hidden, hidden.shape[-1:]), approximate="tanh")
            if masks:
                hidden = hidden * masks[layer]
        return torch.baddbmm(self.biases[-1], hidden, self.weights[-1])
