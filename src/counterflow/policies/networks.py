"""Velocity networks: MLPs over the flattened chunk, and a transformer over its rows.

All are called with (features (B, F), x (B, H, A), t (B,)) and return the velocity (B, H, A).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.errors import InvalidInputError
from counterflow.policies.stacked import Norm, StackedMLP


class TimeEmbedding(nn.Module):
    """Time as [t, sin(2 pi f t), cos(2 pi f t)] with frequencies f from a quarter doubling upwards.

    The low frequencies tell times apart over the whole of [0, 1], the high ones between neighbouring steps.

    Args:
        frequencies: how many.
    """

    def __init__(self, frequencies: int = 8) -> None:
        super().__init__()
        self.dim = 1 + 2 * frequencies
        octaves = torch.arange(frequencies, dtype=torch.float32) - 2
        self.register_buffer("angular", 2 * math.pi * 2.0**octaves, persistent=False)
        self.angular: Tensor

    def forward(self, t: Tensor) -> Tensor:
        """Embed t (B,) as (B, 1 + 2 * frequencies)."""
        time = t[:, None]
        angle = time * self.angular
        return torch.cat([time, angle.sin(), angle.cos()], dim=1)


class MLPNetwork(nn.Module):
    """Observation, flattened chunk and time, concatenated, through equally wide layers with GELU.

    Args:
        features: F.
        horizon: H.
        dim: A.
        width: neurons of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, features: int, horizon: int, dim: int, width: int = 512, depth: int = 4) -> None:
        super().__init__()
        self.time = TimeEmbedding()
        sizes = [features + horizon * dim + self.time.dim, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.out = nn.Linear(width, horizon * dim)

    def forward(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A)."""
        hidden = torch.cat([x.flatten(1), features, self.time(t)], dim=1)
        for layer in self.hidden:
            hidden = functional.gelu(layer(hidden), approximate="tanh")
        velocity: Tensor = self.out(hidden)
        return velocity.view_as(x)


def sinusoidal(t: Tensor, size: int = 16, longest: float = 10_000.0) -> Tensor:
    """Embed times (...) as (..., size), like QGF's official code: cosines, then sines, of `longest` t at falling frequencies."""
    half = size // 2
    frequencies = torch.exp(-math.log(longest) * torch.arange(half, dtype=t.dtype, device=t.device) / half)
    angle = (t * longest)[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class OfflineNetwork(nn.Module):
    """One velocity network of the offline learners, whose inputs are (observation, chunk, time), concatenated in this order.

    Args:
        kind: "plain_mlp" (RQL's actor, FQL's and IFQL's flows: the time as it is, no layer norms), "normed_mlp" (QGF's policy:
            the time embedded, layer norms before the activations but the last), "one_step_mlp" (FQL's one-step policy mu:
            no time; its velocity is mu(s, x) - x, so that one step from noise is what it says).
        features: F.
        horizon: H.
        dim: A.
        width: neurons of a hidden layer.
        depth: hidden layers.
    """

    def __init__(self, kind: str, features: int, horizon: int, dim: int, width: int, depth: int) -> None:
        super().__init__()
        self.kind = kind
        time = {"plain_mlp": 1, "normed_mlp": 16, "one_step_mlp": 0}[kind]
        norm: Norm = "before" if kind == "normed_mlp" else "none"
        chunk = horizon * dim
        self.stack = StackedMLP(features + chunk + time, chunk, 1, width, depth, norm, norm_last=False)

    def forward(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A)."""
        inputs = [features, x.flatten(1)]
        if self.kind == "plain_mlp":
            inputs.append(t[:, None])
        elif self.kind == "normed_mlp":
            inputs.append(sinusoidal(t))
        said: Tensor = self.stack(torch.cat(inputs, dim=1)[None])[0].view_as(x)
        return said - x if self.kind == "one_step_mlp" else said


class TransformerNetwork(nn.Module):
    """A diffusion transformer over the rows of the chunk (DiT, arXiv 2212.09748).

    Every action of the chunk is a token; observation and time modulate each block through adaptive layer norm, whose gates
    begin at zero, so every block begins as the identity.

    Args:
        features: F.
        horizon: H.
        dim: A.
        width: size of a token.
        depth: blocks.
        heads: attention heads; they must divide the width.

    Raises:
        InvalidInputError: the heads do not divide the width.
    """

    def __init__(self, features: int, horizon: int, dim: int, width: int = 128, depth: int = 4, heads: int = 4) -> None:
        super().__init__()
        if width % heads:
            raise InvalidInputError(f"width {width} can't be divided among {heads} heads; choose a multiple.")
        self.time = TimeEmbedding()
        self.token = nn.Linear(dim, width)
        self.position = nn.Parameter(torch.randn(horizon, width) * 0.02)
        self.condition = nn.Sequential(nn.Linear(features + self.time.dim, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(nn.Linear(width, 2 * width))
        self.out = zero_linear(nn.Linear(width, dim))

    def forward(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A)."""
        condition = functional.silu(self.condition(torch.cat([features, self.time(t)], dim=1)))
        tokens = self.token(x) + self.position
        for block in self.blocks:
            tokens = block(tokens, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        velocity: Tensor = self.out(self.norm(tokens) * (1 + scale) + shift)
        return velocity


class TransformerBlock(nn.Module):
    """Self-attention and an MLP, each modulated and gated by the condition (adaLN-Zero).

    Args:
        width: size of a token.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_linear(nn.Linear(width, 6 * width))
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        """Map tokens (B, H, W) given the condition (B, W)."""
        modulation = self.modulation(condition)[:, None].chunk(6, dim=-1)
        attention_shift, attention_scale, attention_gate, mlp_shift, mlp_scale, mlp_gate = modulation
        tokens = tokens + attention_gate * self._attend(self.norm(tokens) * (1 + attention_scale) + attention_shift)
        hidden = functional.gelu(self.mlp_in(self.norm(tokens) * (1 + mlp_scale) + mlp_shift), approximate="tanh")
        mixed: Tensor = tokens + mlp_gate * self.mlp_out(hidden)
        return mixed

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = self.attention_in(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        attended: Tensor = self.attention_out(mixed.transpose(1, 2).flatten(2))
        return attended


def zero_linear(layer: nn.Linear) -> nn.Linear:
    """Return the layer with weight and bias set to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
