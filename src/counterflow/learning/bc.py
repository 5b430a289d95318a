"""Behaviour cloning by flow matching: how a prior is made.

The velocity network regresses a - x_0 at x_t = (1 - t) x_0 + t a for action chunks a of demonstrations, given the
observation at the chunk's start:

    L = E || v(x_t, t, s) - (a - x_0) ||^2,   x_0 ~ N(0, I),  t ~ U[0, 1] or beta

Sources: flow matching, arXiv 2210.02747; pi0 for the beta law, arXiv 2410.24164. What is deployed are exponentially averaged
weights.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.checks import COUNT, NOT_NEGATIVE, RATE, Range, check_names
from counterflow.data import ChunkBatch
from counterflow.errors import CheckpointError, InvalidInputError
from counterflow.flow import matching_loss, sample_time
from counterflow.flow.matching import TimeLaw
from counterflow.policies import FlowPolicy, GeneralistPolicy, NetworkConfig, NormalisationKind, bind
from counterflow.random import child_seed, generator

Schedule = Literal["one_cycle", "cosine", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]

Trainable = FlowPolicy | GeneralistPolicy
"""What behaviour cloning can train: a policy with a network, and the normalisation of what goes in and comes out."""


@dataclass(frozen=True)
class BCConfig:
    """Settings of behaviour cloning.

    Attributes:
        horizon: H, actions in a chunk.
        network: the velocity network.
        steps: updates in all.
        batch_size: chunks in an update.
        learning_rate: the highest, of AdamW.
        schedule: "one_cycle" (cosine up over the first tenth, cosine down to nothing), "cosine" (down only), "constant".
        weight_decay: AdamW's.
        gradient_norm: to which gradients are clipped; 0: not at all.
        time_law: how t is drawn, see `counterflow.flow.sample_time`.
        average: decay of the averaged weights an update; 0: none, the last weights are deployed.
        observation_normalisation: fitted to the training data.
        action_normalisation: likewise.
        precision: of the network's arithmetic (losses and weights stay float32); "auto" takes bfloat16 where the hardware
            has instructions for it.
        compile: whether to compile the loss and its gradient.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: no such schedule or precision.
    """

    horizon: int = 5
    network: NetworkConfig = field(default_factory=NetworkConfig)
    steps: int = 12_000
    batch_size: int = 512
    learning_rate: float = 1e-3
    schedule: Schedule = "one_cycle"
    weight_decay: float = 0.0
    gradient_norm: float = 0.0
    time_law: TimeLaw = "uniform"
    average: float = 0.999
    observation_normalisation: NormalisationKind = "mean_std"
    action_normalisation: NormalisationKind = "none"
    precision: Precision = "auto"
    compile: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        COUNT.check_all(self, "horizon", "steps", "batch_size")
        RATE.check_all(self, "learning_rate")
        Range(0, 1, below=True).check("average", self.average)
        NOT_NEGATIVE.check_all(self, "weight_decay", "gradient_norm")
        check_names(self, schedule=Schedule, precision=Precision)


@dataclass(frozen=True)
class Draws:
    """What is random in a loss.

    Attributes:
        noise: (B, H, A) draws of N(0, I).
        t: (B,) times.
    """

    noise: Tensor
    t: Tensor


def draw(batch: int, policy: Trainable, time_law: TimeLaw, rng: torch.Generator) -> Draws:
    """Draw noise and times for a batch, on the generator's device."""
    shape = (batch, policy.action_spec.horizon, policy.action_spec.dim)
    noise = torch.randn(shape, generator=rng, device=rng.device)
    return Draws(noise, sample_time(batch, time_law, generator=rng))


def bc_loss(policy: Trainable, batch: ChunkBatch, draws: Draws) -> Tensor:
    """Return the flow-matching loss () of the policy on observations (B, O) and chunks (B, H, A), environment units."""
    field = bind(policy, policy.encode(batch.observations))
    return matching_loss(field, policy.action_spec.normalise(batch.actions), draws.noise, draws.t)


def learning_rate_at(step: int, config: BCConfig) -> float:
    """Return the learning rate of update `step`, 0 <= step < config.steps."""
    progress = step / config.steps
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    if progress < 0.1:
        # Twenty-five times smaller at first, as in PyTorch's own one-cycle schedule.
        share = (1 - math.cos(math.pi * progress / 0.1)) / 2
        return config.learning_rate * (1 / 25 + (1 - 1 / 25) * share)
    return config.learning_rate * (1 + math.cos(math.pi * (progress - 0.1) / 0.9)) / 2


class BCLearner:
    """Fits a policy's velocity network to chunks.

    Args:
        policy: the policy to train; its network is changed in place.
        config: the settings.
        seed: from which noise and times descend.
    """

    def __init__(self, policy: Trainable, config: BCConfig, seed: int) -> None:
        self.policy: Trainable = policy.requires_grad_(True).train()
        self.config, self.step = config, 0
        self.averaged: Trainable = copy.deepcopy(policy).requires_grad_(False).eval()
        self._rng = generator(child_seed(seed, "bc"), policy.device)
        self._parameters: list[Tensor] = list(policy.network.parameters())
        self._averages: list[Tensor] = list(self.averaged.network.parameters())
        self._optimiser = torch.optim.AdamW(
            self._parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.precision = choose_precision(config.precision, policy.device)
        self.compiled = config.compile and can_compile(policy.device)
        mode = "max-autotune-no-cudagraphs" if policy.device.type == "cuda" else None
        self._loss = torch.compile(self._loss_and_cast, mode=mode) if self.compiled else self._loss_and_cast

    def update(self, batch: ChunkBatch) -> Tensor:
        """Take one step; return the loss () without waiting for the device."""
        draws = draw(len(batch.actions), self.policy, self.config.time_law, self._rng)
        loss = self._loss(self.policy, batch, draws)
        self._optimiser.zero_grad()
        loss.backward()
        if self.config.gradient_norm:
            torch.nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_norm)
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate_at(self.step, self.config)
        self._optimiser.step()
        with torch.no_grad():
            # Early on the average would remember the random start: its decay grows with the steps taken.
            decay = min(self.config.average, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self._averages, self._parameters, 1 - decay)
        self.step += 1
        return loss.detach()

    @torch.no_grad()
    def validation_loss(self, batches: Iterable[ChunkBatch], seed: int) -> float:
        """Return the averaged weights' loss over `batches`, with draws that descend from `seed`: comparable over time."""
        rng = generator(child_seed(seed, "validation"), self.policy.device)
        total, count = torch.zeros((), device=self.policy.device), 0
        for batch in batches:
            draws = draw(len(batch.actions), self.averaged, self.config.time_law, rng)
            total += bc_loss(self.averaged, batch, draws) * len(batch.actions)
            count += len(batch.actions)
        if count == 0:
            raise InvalidInputError("no held-out chunks were given; expected at least one.")
        return float(total) / count

    def state(self) -> dict[str, Tensor]:
        """Return everything that continuing with the same numbers needs, by name."""
        state = {f"network.{name}": value for name, value in self.policy.network.state_dict().items()}
        state |= {f"averaged.{name}": value for name, value in self.averaged.network.state_dict().items()}
        for index, entry in self._optimiser.state_dict()["state"].items():
            state |= {f"optimiser.{index}.{name}": value for name, value in entry.items()}
        state |= {"rng": self._rng.get_state(), "step": torch.tensor(self.step)}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: the state is not one of a learner with these settings.
        """
        try:
            self.policy.network.load_state_dict(_with_prefix(state, "network."))
            self.averaged.network.load_state_dict(_with_prefix(state, "averaged."))
            groups = self._optimiser.state_dict()["param_groups"]
            entries: dict[int, dict[str, Tensor]] = {}
            for name, value in _with_prefix(state, "optimiser.").items():
                index, key = name.split(".", 1)
                entries.setdefault(int(index), {})[key] = value
            self._optimiser.load_state_dict({"state": entries, "param_groups": groups})
            self._rng.set_state(state["rng"])
            self.step = int(state["step"])
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the training state does not fit this network and optimiser: {error}. Resume with the settings that the "
                "run began with, or begin a new run."
            ) from error

    def _loss_and_cast(self, policy: Trainable, batch: ChunkBatch, draws: Draws) -> Tensor:
        with torch.autocast(policy.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return bc_loss(policy, batch, draws)


def choose_precision(wanted: Precision, device: torch.device) -> Literal["bfloat16", "float32"]:
    """Return the precision to compute in: "auto" is bfloat16 where the device multiplies it natively."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` has what it needs: on a CPU, a C++ compiler."""
    return device.type == "cuda" or any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def _with_prefix(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
