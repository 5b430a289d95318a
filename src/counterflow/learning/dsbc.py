"""DSBC: distil steering into a small noise policy (arXiv 2606.13675, section on distillation).

Successful steered rollouts, or demonstrations whose chunks were inverted, give pairs of what the frozen policy saw and the
noise from which its flow reached the executed chunk. A small network regresses the noise:

    L = E || f(s + e) - w ||^2,   e ~ N(0, sigma^2 I) on the normalised inputs

and at test time the frozen policy denoises what it says. The prior is not needed while training. The same recipe on the
executed chunk, L = E || f(s + e) - a ||^2, is the baseline BC.

With an intention (`counterflow.steering.Intention`) both are trained on the same examples, and the flow starts at the most likely
noise given both.

A few hundred samples are few: what keeps the network from learning them by heart are noise on its inputs, dropout, weight
decay, an ensemble whose members each hold out other episodes, and stopping each member where its held-out loss was lowest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import COUNT, RATE, Range
from counterflow.errors import DatasetError, MismatchError
from counterflow.learning.held_out import HeldOut, Progress, fit, hold_out
from counterflow.policies import Normaliser
from counterflow.policies.ensemble import EnsembleMLP
from counterflow.random import check_seed, child_seed, generator
from counterflow.steering.learned import ChunkRegressor, RegressorConfig


@dataclass(frozen=True)
class DSBCConfig:
    """Settings of the distillation.

    Attributes:
        regressor: the network, what it looks at and what it predicts.
        steps: updates at most.
        batch_size: examples in a member's batch.
        learning_rate: of AdamW at first; it falls to nothing along a cosine.
        weight_decay: AdamW's.
        dropout: share of hidden neurons left out.
        input_noise: standard deviation of the noise on the normalised inputs.
        held_out: share of the episodes that each member holds out for early stopping, at least one where there are two
            episodes or more; 0: none, and the last weights are kept.
        evaluate_every: updates between two held-out losses.
        patience: evaluations without a member improving after which training stops.

    Raises:
        InvalidInputError: a number is out of range.
    """

    regressor: RegressorConfig = field(default_factory=RegressorConfig)
    steps: int = 3_000
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    dropout: float = 0.1
    input_noise: float = 0.1
    held_out: float = 0.2
    evaluate_every: int = 50
    patience: int = 20

    def __post_init__(self) -> None:
        """Check every setting."""
        COUNT.check_all(self, "steps", "batch_size", "evaluate_every", "patience")
        RATE.check_all(self, "learning_rate")
        for name, most in (("dropout", 0.95), ("held_out", 0.9), ("input_noise", 10.0), ("weight_decay", 100.0)):
            Range(0, most).check_all(self, name)


@dataclass(frozen=True)
class NoiseExamples:
    """What is learned from: pairs of inputs and chunks, and the episodes that they are from.

    Attributes:
        inputs: (N, F) float32.
        targets: (N, H, A) float32: noises, or normalised actions, without what the flow moves beyond them (padding).
        episodes: (N,) int64, the number of each pair's episode.
        binding: what the noises belong to.
        chunks: (N, H, A) float32: beside noises, the normalised actions that they stand for, of which an intention is learned;
            None where none is.
    """

    inputs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.float32]
    episodes: npt.NDArray[np.int64]
    binding: Binding
    chunks: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        """Check shapes and values.

        Raises:
            DatasetError: nothing is there, or shapes don't fit, or values are not finite.
        """
        if len(self.inputs) == 0 or self.inputs.ndim != 2 or self.inputs.shape[1] == 0:
            raise DatasetError(
                f"the inputs to learn from have shape {self.inputs.shape}; expected (N, F), both 1 or more. Record episodes "
                "with observations, or with a policy that offers features."
            )
        expected = (len(self.inputs), self.binding.horizon, self.binding.dim)
        chunks = self.targets if self.chunks is None else self.chunks
        if not self.targets.shape == chunks.shape == expected or self.episodes.shape != expected[:1]:
            raise DatasetError(
                f"targets {self.targets.shape}, chunks {chunks.shape} and episodes {self.episodes.shape} don't fit "
                f"{len(self.inputs)} inputs; expected {expected}, the same, and {expected[:1]}."
            )
        for name, values in (("inputs", self.inputs), ("targets", self.targets), ("chunks", chunks)):
            finite = np.isfinite(values).reshape(len(self.inputs), -1).all(1)
            if not finite.all():
                raise DatasetError(
                    f"{name} hold NaN or infinite values, first in example {int(np.argmin(finite))} (episode "
                    f"{int(self.episodes[np.argmin(finite)])}). Leave that episode out, or record it again."
                )


def join(parts: Sequence[NoiseExamples], names: Sequence[str] = ()) -> NoiseExamples:
    """Return several lots of examples as one, their episodes kept apart; a lot may be there more than once.

    Args:
        parts: at least one.
        names: what to call them in an error.

    Raises:
        MismatchError: their noises belong to different policies, or their inputs differ in size.
    """
    first, called = parts[0], [*names, *(f"the data {index}" for index in range(len(names), len(parts)))]
    offsets: dict[int, int] = {}
    following = 0
    for part, name in zip(parts, called, strict=True):
        first.binding.check(part.binding, f"{called[0]} (compared with {name})")
        if part.inputs.shape[1] != first.inputs.shape[1]:
            raise MismatchError(
                f"{called[0]} has inputs of {first.inputs.shape[1]} numbers, {name} of {part.inputs.shape[1]}; expected the "
                "same. Learn from each by itself."
            )
        if id(part) not in offsets:  # a repeated lot is the same episodes again, or it would be held out from itself
            offsets[id(part)] = following
            following += int(part.episodes.max()) + 1
    return NoiseExamples(
        np.concatenate([part.inputs for part in parts]),
        np.concatenate([part.targets for part in parts]),
        np.concatenate([part.episodes + offsets[id(part)] for part in parts]),
        first.binding,
        None if any(part.chunks is None for part in parts) else np.concatenate([part.chunks for part in parts]),
    )


@dataclass(frozen=True)
class Draws:
    """What is random in a loss.

    Attributes:
        examples: (M, B) which examples each member sees.
        input_noise: (M, B, F) draws of N(0, I).
        masks: for each hidden layer, (M, B, W): 0, or 1 / (1 - dropout).
    """

    examples: Tensor
    input_noise: Tensor
    masks: tuple[Tensor, ...]


def regression_loss(network: EnsembleMLP, inputs: Tensor, targets: Tensor, draws: Draws, input_noise: float) -> Tensor:
    """Return each member's mean squared error (M,).

    Args:
        network: M members, F to D.
        inputs: (N, F) normalised.
        targets: (N, D) normalised.
        draws: what is random.
        input_noise: standard deviation of the noise on the inputs.
    """
    predicted: Tensor = network(inputs[draws.examples] + input_noise * draws.input_noise, draws.masks)
    return (predicted - targets[draws.examples]).square().mean((1, 2))


class DSBCLearner:
    """Fits a regressor to examples.

    Args:
        examples: what to learn.
        config: the settings.
        seed: from which weights, held-out episodes and draws descend.
        device: where to train.
        initial: a regressor of the same sizes to go on from (as DAgger does between rounds); None: begin anew.
    """

    def __init__(
        self,
        examples: NoiseExamples,
        config: DSBCConfig,
        seed: int,
        device: torch.device | str = "cpu",
        initial: ChunkRegressor | None = None,
    ) -> None:
        check_seed(seed)
        self.config, self.step = config, 0
        inputs = torch.from_numpy(examples.inputs)
        targets = config.regressor.latent.project(torch.from_numpy(examples.targets)).flatten(1)
        bound = config.regressor.bound
        self.cut = 0.0 if bound is None else float((targets.abs() > bound).float().mean())
        if initial is None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(child_seed(seed, "weights"))
                self.regressor = ChunkRegressor(
                    config.regressor,
                    Normaliser.fit(inputs, "mean_std"),
                    Normaliser.fit(targets, "mean_std"),
                    examples.binding,
                )
        else:
            self.regressor = _copy_of(initial, examples.binding, config.regressor)
            self.regressor.intention = None  # trained apart
        self.regressor.to(device).train()
        self._rng = generator(child_seed(seed, "distillation"), device)
        self._inputs = self.regressor.prepare(inputs.to(device))
        self._targets = self.regressor.output_normaliser.normalise(targets.to(device))
        held_out = hold_out(examples.episodes, config.regressor.members, config.held_out, seed)
        self.held_out = HeldOut(self.regressor.network, held_out, device)
        self._optimiser = torch.optim.AdamW(
            self.regressor.network.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def draw(self) -> Draws:
        """Draw a batch for every member."""
        members, batch = self.config.regressor.members, self.config.batch_size
        device = self._inputs.device
        examples = self.held_out.draw(batch, self._rng)
        noise = torch.randn((members, batch, self._inputs.shape[1]), generator=self._rng, device=device)
        masks: tuple[Tensor, ...] = ()
        if self.config.dropout:
            keep = 1 - self.config.dropout
            shape = (members, batch, self.config.regressor.width)
            masks = tuple(
                (torch.rand(shape, generator=self._rng, device=device) < keep).float() / keep
                for _ in range(self.config.regressor.depth)
            )
        return Draws(examples, noise, masks)

    def update(self) -> Tensor:
        """Take one step; return the mean loss () without waiting for the device."""
        losses = regression_loss(
            self.regressor.network, self._inputs, self._targets, self.draw(), self.config.input_noise
        )
        for group in self._optimiser.param_groups:
            group["lr"] = self.config.learning_rate * (1 + math.cos(math.pi * self.step / self.config.steps)) / 2
        self._optimiser.zero_grad()
        losses.sum().backward()  # members share nothing, so each gets the gradient of its own loss
        self._optimiser.step()
        self.step += 1
        return losses.detach().mean()

    @torch.no_grad()
    def evaluate(self) -> bool:
        """Compute held-out losses, keep the weights of members that improved; return whether any did."""
        predicted = self.regressor.network(self._inputs.expand(self.config.regressor.members, -1, -1))
        return self.held_out.judge((predicted - self._targets).square().mean(2))

    def fit(self, on_progress: Callable[[Progress], None] | None = None) -> ChunkRegressor:
        """Train (see `held_out.fit`); return the regressor, frozen. Losses are in units of the targets' variance.

        Raises:
            DatasetError: the loss is not finite: the examples hold values that no network can learn.
        """
        fit(self.update, self.evaluate, self.held_out, self.config, on_progress)
        return self.regressor.requires_grad_(False).eval()

    def provenance(self) -> dict[str, Any]:
        """Return what is worth recording about the training, as plain values; `cut` is what the bound cuts of the targets."""
        held_out = [round(float(loss), 6) for loss in self.held_out.loss if torch.isfinite(loss)]
        found = {"updates": self.step, "held_out_loss": held_out, "examples": len(self._inputs)}
        return {**found, "cut": round(self.cut, 4)}


def _copy_of(initial: ChunkRegressor, binding: Binding, wanted: RegressorConfig) -> ChunkRegressor:
    """Return a copy to train further, after checking that it is for these noises and of this architecture."""
    initial.binding.check(binding, "the noise policy to go on from")
    if initial.config != wanted:
        raise MismatchError(
            f"the noise policy to go on from is {initial.config}; the settings say {wanted}. Use the same, or begin anew."
        )
    return copy.deepcopy(initial).requires_grad_(True)


def distil(
    examples: NoiseExamples,
    config: DSBCConfig | None = None,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    initial: ChunkRegressor | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> ChunkRegressor:
    """Distil examples into a regressor; see `DSBCLearner`.

    Raises:
        DatasetError: the examples can't be learned from.
        MismatchError: `initial` belongs to another policy.
        InvalidInputError: the seed is out of range.
    """
    config = DSBCConfig() if config is None else config
    learner = DSBCLearner(examples, config, seed, device, initial)
    regressor = learner.fit(on_progress)
    regressor.provenance = learner.provenance()
    if config.regressor.intention is None:
        return regressor
    if examples.chunks is None:
        raise DatasetError(
            "the examples hold no chunks to learn an intention from. Record them, or leave the intention out."
        )
    meant = replace(examples, targets=examples.chunks, chunks=None)
    settings = replace(config, regressor=config.regressor.of_intention())
    regressor.intention = distil(
        meant,
        settings,
        seed=seed,
        device=device,
        initial=None if initial is None else initial.intention,
        on_progress=on_progress,
    )
    regressor.provenance["intention"] = regressor.intention.provenance
    return regressor
