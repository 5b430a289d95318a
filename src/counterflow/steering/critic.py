"""Critics: an ensemble Q(s, chunk) that judges a policy's chunks, whatever the policy is made of.

A `ChunkCritic` was trained by somebody else (offline reinforcement learning; a frozen policy's own successes and failures). Here
it is only asked: `CriticGuidance` follows its gradient while the policy denoises (QGF, arXiv 2606.11087; on a frozen VLA's
features GAF, arXiv 2607.02092), `HighestValue` keeps the best of several chunks.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.checks import check_names, check_numbers
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import BasePolicy, Normaliser
from counterflow.policies.described import DescribedModule, Format
from counterflow.policies.stacked import Norm, StackedMLP
from counterflow.random import child_seed, generator
from counterflow.steering.aggregation import Aggregation, aggregate
from counterflow.steering.context import SteeringContext
from counterflow.steering.steered import Inputs, frozen, inputs_of

LARGEST_INPUT = 10.0  # standard deviations; what is further off than this looks the same to the network


@dataclass(frozen=True)
class CriticConfig:
    """A critic's architecture, and what it looks at beside the chunk.

    Attributes:
        inputs: "features" (the frozen policy's own, see `features_of`) or "observation".
        members: M, networks in the ensemble.
        width: neurons of a hidden layer.
        depth: hidden layers.
        norm: where layer norms stand, see `StackedMLP`: "before" the activation (QGF's), "after" it (RQL's, FQL's) or "none".
        task_dim: E, size of a task embedding that it is conditioned on; 0: none.

    Raises:
        UnknownNameError: no such kind of input, or norm.
        InvalidInputError: a number is out of range.
    """

    inputs: Inputs = "features"
    members: int = 2
    width: int = 512
    depth: int = 4
    norm: Norm = "before"
    task_dim: int = 0

    def __post_init__(self) -> None:
        """Check names and numbers."""
        check_names(self, inputs=Inputs, norm=Norm)
        check_numbers(self, or_zero=("task_dim",))


@dataclass(frozen=True)
class CriticBinding:
    """Whose chunks a critic judges, and which part of them.

    Attributes:
        policy: fingerprint of the frozen policy, whose units (and features) the critic knows; "": any policy that acts in the
            environment's own units.
        family: the environments that share observations and actions; "": unknown.
        horizon: h, rows that it judges: those that are executed.
        dim: A, without padding.
        past: rows of the chunk before those.

    Raises:
        InvalidInputError: a number is out of range.
    """

    policy: str
    family: str
    horizon: int
    dim: int
    past: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        check_numbers(self, or_zero=("past",))

    def check(self, policy: BasePolicy) -> None:
        """Check that these are the chunks of `policy`, steered or not.

        Raises:
            MismatchError: they are not.
        """
        inner, spec = frozen(policy), policy.action_spec
        differing = []
        name = str(getattr(inner, "fingerprint", type(inner).__name__))
        family = str(getattr(inner, "family", ""))
        if self.policy and name != self.policy:
            differing.append(f"policy {self.policy!r}, not {name!r}")
        elif not self.policy and spec.normaliser is not None and spec.normaliser.kind != "none":
            differing.append(f"actions in the environment's units, not normalised by {spec.normaliser.kind!r}")
        if self.family and family and family != self.family:
            differing.append(f"family {self.family!r}, not {family!r}")
        rows = {spec.horizon - spec.past, spec.executed or spec.horizon - spec.past}
        if self.past != spec.past or self.horizon not in rows or self.dim != spec.dim:
            executed = " or ".join(str(count) for count in sorted(rows, reverse=True))
            differing.append(
                f"rows {self.past} to {self.past + self.horizon} of {self.dim} numbers, not {executed} rows from row "
                f"{spec.past} on of {spec.dim}"
            )
        if differing:
            raise MismatchError(
                f"the critic was made for other chunks: {'; '.join(differing)}. Its values would mean nothing. Use the policy "
                "that it was made for, or train one on rollouts of this policy ('counterflow record --steer base', then "
                "'counterflow critic')."
            )


def task_embedding(text: str, size: int) -> Tensor:
    """Return a fixed embedding (E,) of a task's name or sentence: the normalised sum of a random direction a word.

    Texts that share words lie nearer to each other; nothing is learned and nothing is downloaded.
    """
    words = re.findall(r"[a-z0-9]+", text.lower())
    vectors = [torch.randn(size, generator=generator(child_seed(0, "word", word))) for word in words]
    return functional.normalize(torch.stack(vectors).sum(0), dim=0) if vectors else torch.zeros(size)


class ChunkCritic(DescribedModule):
    """An ensemble Q_m(s, chunk): what the policy sees, with a flattened chunk (and a task embedding), to a value.

    Args:
        config: architecture and inputs.
        binding: whose chunks it judges.
        input_normaliser: of the inputs (F entries); of kind "none", nothing is done to them.
        network: a trained one, (M, B, F + h A + E) to (M, B, 1); None: begin anew with the architecture of `config`.

    Raises:
        InvalidInputError: the network is not the one that `config` and the sizes describe.
    """

    FORMAT = Format(
        "counterflow/chunk-critic",
        1,
        "Critics are made by 'counterflow critic', and by offline reinforcement learning.",
    )
    CALLED = "the critic"

    def __init__(
        self,
        config: CriticConfig,
        binding: CriticBinding,
        input_normaliser: Normaliser,
        network: nn.Module | None = None,
    ) -> None:
        super().__init__()
        size = input_normaliser.dim + binding.horizon * binding.dim + config.task_dim
        if network is None:
            network = StackedMLP(size, 1, config.members, config.width, config.depth, config.norm)
        elif isinstance(network, StackedMLP):
            norms = 0 if config.norm == "none" else config.depth
            wanted = (size, 1, config.members, (config.width,) * config.depth, config.norm, norms)
            given = (network.inputs, network.outputs, network.count, network.hidden, network.norm, len(network.scales))
            if given != wanted:
                raise InvalidInputError(
                    f"a critic's network has (inputs, outputs, count, hidden layers, norm, norms) {given}; expected {wanted} for "
                    f"{config} and chunks of {binding.horizon} x {binding.dim} beside {input_normaliser.dim} inputs."
                )
        self.config, self.binding, self.input_normaliser = config, binding, input_normaliser
        self.network = network

    @property
    def like(self) -> Tensor:
        """A tensor of the type and on the device that it computes with."""
        return next(self.network.parameters(), self.input_normaliser.offset)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (..., F)."""
        if self.input_normaliser.kind == "none":
            return inputs
        return self.input_normaliser.normalise(inputs).clamp(-LARGEST_INPUT, LARGEST_INPUT)

    def values(self, inputs: Tensor, chunks: Tensor, task: Tensor | None = None) -> Tensor:
        """Return what every member says, (M, B).

        Args:
            inputs: (B, F) what the policy saw, as `inputs_of` returns it.
            chunks: (B, h, A) normalised, without padding and past, as `judged` returns them; gradients reach them.
            task: (E,) or (B, E) the task's embedding, if it was made with one.

        Raises:
            MismatchError: the critic was made for other sizes.
        """
        size = (self.binding.horizon, self.binding.dim)
        if inputs.ndim != 2 or inputs.shape[1] != self.input_normaliser.dim:
            raise MismatchError(
                f"the {self.config.inputs} have shape {tuple(inputs.shape)}; the critic was made for "
                f"(B, {self.input_normaliser.dim}). Use it with the policy and environment that it was made for."
            )
        if chunks.shape != (len(inputs), *size):
            raise MismatchError(
                f"the chunks have shape {tuple(chunks.shape)}; the critic was made for {(len(inputs), *size)}. Use it with the "
                "policy that it was made for, and leave out padding and past."
            )
        self.check_task(task)
        like = self.like
        parts = [self.prepare(inputs.to(like)), chunks.flatten(1).to(like)]
        if task is not None:
            parts.append(task.to(like).expand(len(inputs), -1))
        values: Tensor = self.network(torch.cat(parts, -1).expand(self.config.members, -1, -1))
        return values.squeeze(-1)

    def value(
        self,
        inputs: Tensor,
        chunks: Tensor,
        how: Aggregation = "min",
        rho: float = 1.0,
        task: Tensor | None = None,
    ) -> Tensor:
        """Return the ensemble's value (B,), as `aggregate` makes it of the `values`."""
        return aggregate(self.values(inputs, chunks, task), how, rho)

    def judged(self, chunks: Tensor) -> Tensor:
        """Return the part (..., h, A) of the flow's states (..., H, A + padding) that it judges."""
        past = self.binding.past
        return chunks[..., past : past + self.binding.horizon, : self.binding.dim]

    def inputs_of(self, policy: BasePolicy, context: SteeringContext) -> Tensor:
        """Return what it looks at, (B, F), from a steering context; without gradients."""
        with torch.no_grad():
            return inputs_of(policy, context, self.config.inputs)

    def check_task(self, task: Tensor | None) -> None:
        """Raise `MismatchError` unless `task` is the embedding that it was made with, or None where it was made without."""
        size = 0 if task is None else task.shape[-1]
        if size != self.config.task_dim:
            raise MismatchError(
                f"a task embedding of {size} numbers was given; the critic was made for {self.config.task_dim} (0: none)."
            )

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values."""
        return {
            "critic": asdict(self.config),
            "binding": asdict(self.binding),
            "input": {"dim": self.input_normaliser.dim, "normalisation": self.input_normaliser.kind},
        }

    def save(self, path: Path | str) -> Path:
        """Write it to `path` (ending in ".safetensors", or without an ending), whole or not at all.

        Raises:
            InvalidInputError: its network is none of this library's, so nobody could load it.
            StorageError: writing failed; what stood there before is untouched.
        """
        if not isinstance(self.network, StackedMLP):
            raise InvalidInputError(
                f"a critic with a {type(self.network).__name__} can't be written; expected a StackedMLP. Keep yours in a file "
                "of its own and build the critic around it."
            )
        return super().save(path)

    @classmethod
    def from_description(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make what a description tells of."""
        made = cls(
            CriticConfig(**content["critic"]),
            CriticBinding(**content["binding"]),
            Normaliser(
                tensors["input_normaliser.offset"],
                tensors["input_normaliser.scale"],
                content["input"]["normalisation"],
            ),
        )
        return made.to(next(tensor for name, tensor in tensors.items() if name.startswith("network.")).dtype)
