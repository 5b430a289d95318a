"""What the offline learners share: many seeds at once, draws in blocks, targets, one optimiser, a state to go on from.

Seeds are the leading dimension S of everything: networks, batches, draws, losses. A seed's own generator draws its windows and
noises, so its numbers do not depend on which others are trained beside it. An algorithm is a subclass in a file of its own that
says which networks there are, what is random in its loss, and the loss.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from counterflow.checks import RATE, check_numbers
from counterflow.errors import InvalidInputError
from counterflow.learning.bc import Precision, can_compile, choose_precision
from counterflow.learning.state import Resumable
from counterflow.policies import NetworkConfig, as_device
from counterflow.policies.stacked import StackedMLP
from counterflow.random import check_seed, child_seed, generator

BLOCK = 50  # updates whose windows and noises are drawn together; part of what a seed means

Batch = TypeVar("Batch")
Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss of every seed (S,), and what is worth watching, each (S,)."""


@dataclass(frozen=True)
class Sizes:
    """What the networks see and say.

    Attributes:
        observation: O.
        action: A.
        horizon: H, actions in a chunk.
    """

    observation: int
    action: int
    horizon: int

    @property
    def chunk(self) -> int:
        """H * A, the size of a flattened chunk."""
        return self.horizon * self.action


@dataclass(frozen=True)
class OfflineConfig:
    """Settings that all offline learners have.

    Attributes:
        horizon: h, actions in a chunk.
        discount: gamma, a step.
        batch_size: windows in an update.
        learning_rate: of Adam.
        target_rate: tau, by which target networks follow.
        flow_steps: K, steps of the flow.
        width: neurons of a hidden layer, of every network.
        depth: hidden layers.
        precision: of the networks' arithmetic; losses and weights stay float32.
        compile: whether to compile the loss and its gradient.

    Raises:
        InvalidInputError: a number is out of range.
    """

    horizon: int = 5
    discount: float = 0.99
    batch_size: int = 256
    learning_rate: float = 3e-4
    target_rate: float = 0.005
    flow_steps: int = 10
    width: int = 512
    depth: int = 4
    precision: Precision = "float32"
    compile: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self)
        RATE.check_all(self, "discount", "learning_rate", "target_rate")


Config = TypeVar("Config", bound=OfflineConfig)


@dataclass(frozen=True)
class Following:
    """A target network and what it follows: target <- target + rate (online - target), with the parameters before the step."""

    online: StackedMLP
    target: StackedMLP
    rate: float


@dataclass(frozen=True)
class Field:
    """A velocity network as a policy can carry it (`FlowPolicy`).

    Attributes:
        network: its architecture.
        stack: S networks, one a seed.
    """

    network: NetworkConfig
    stack: StackedMLP


@dataclass(frozen=True)
class Critic:
    """A value network of (observation, flattened chunk) as guidance and best-of-N can use it.

    Attributes:
        stack: S * M networks.
        constants: what its last inputs are for that use, for example a flow time of 1.
    """

    stack: StackedMLP
    constants: tuple[float, ...] = ()


class OfflineLearner(Resumable, ABC, Generic[Config, Batch]):
    """Trains the networks of S seeds together.

    Args:
        sizes: what the networks see and say.
        config: the settings.
        seeds: one a run that is trained.
        device: where to train.

    Raises:
        InvalidInputError: no seed was given, or one twice.
    """

    name: ClassVar[str]
    batch_kind: ClassVar[str]  # "windows" or "chunks": which gather of `WindowSampler` makes its batches

    def __init__(self, sizes: Sizes, config: Config, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        if not seeds or len({*seeds}) != len(seeds):
            raise InvalidInputError(f"the seeds are {tuple(seeds)}; expected one or more different ones.")
        self.sizes, self.config, self.seeds = sizes, config, tuple(check_seed(seed) for seed in seeds)
        self.device, self.step = as_device(device), 0
        self.networks = self.build()
        weights = [generator(child_seed(seed, "weights")) for seed in self.seeds]
        followed = {id(one.target) for one in self.following()}
        for network in self.networks.values():
            if id(network) not in followed:
                network.reset(weights)
        for one in self.following():
            one.target.load_state_dict(one.online.state_dict())
            one.target.requires_grad_(False)
        self._modules = nn.ModuleDict(self.networks).to(self.device)
        self._parameters = [one for one in self._modules.parameters() if one.requires_grad]
        self._optimiser = torch.optim.Adam(self._parameters, lr=config.learning_rate, fused=True)
        self._rngs = [generator(child_seed(seed, "offline"), self.device) for seed in self.seeds]
        self._block: tuple[Tensor, Any] | None = None
        self._block_begins = [rng.get_state() for rng in self._rngs]
        self.precision = choose_precision(config.precision, self.device)
        self.compiled = config.compile and can_compile(self.device)
        # CUDA graphs on a GPU: an update of small networks is otherwise bound by launching kernels.
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self._loss: Callable[[Batch, Any], Losses] = (
            torch.compile(self._loss_and_cast, mode=mode) if self.compiled else self._loss_and_cast
        )

    @abstractmethod
    def build(self) -> dict[str, StackedMLP]:
        """Make every network by name, targets included."""

    @abstractmethod
    def following(self) -> Sequence[Following]:
        """Say which targets follow which networks."""

    @abstractmethod
    def draw(self, rng: torch.Generator, updates: int) -> Any:
        """Draw what is random in the losses of one seed's next updates: a dataclass of tensors (U, B, ...)."""

    @abstractmethod
    def loss(self, batch: Batch, draws: Any) -> Losses:
        """Return the losses of a batch, seeds first: the sum's gradient is every seed's own."""

    @abstractmethod
    def field(self) -> Field:
        """Return the velocity network that acts."""

    @abstractmethod
    def critic(self) -> Critic | None:
        """Return the value network that can guide, or None where there is none."""

    def block(self, draw_starts: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """Draw the windows of the updates up to the next multiple of `BLOCK`, and what is random in their losses.

        Args:
            draw_starts: (count, generator) -> (count, ...) what a window is known by, its start for example.

        Returns:
            (U, S, B, ...) of these, U the updates that remain in this block.
        """
        first = self.step % BLOCK
        if first == 0 or self._block is None:
            self._block_begins = [rng.get_state() for rng in self._rngs]
            size = self.config.batch_size
            starts, draws = [], []
            for rng in self._rngs:
                starts.append(draw_starts(BLOCK * size, rng).unflatten(0, (BLOCK, size)))
                draws.append(self.draw(rng, BLOCK))
            self._block = torch.stack(starts, 1), _stacked(draws)
        return self._block[0][first:]

    def update(self, batch: Batch) -> dict[str, Tensor]:
        """Take one step of every seed; return its numbers, each (S,), without waiting for the device.

        The batch must be made of the next row of what `block` returned.
        """
        if self._block is None:
            raise InvalidInputError("an update was asked for before `block` had drawn windows; call it first.")
        draws = _row(self._block[1], self.step % BLOCK)
        numbers = self.apply(batch, draws)
        self.step += 1
        if self.step % BLOCK == 0:
            self._block = None
        return numbers

    def apply(self, batch: Batch, draws: Any) -> dict[str, Tensor]:
        """Take one step with given draws."""
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        losses, numbers = self._loss(batch, draws)
        self._optimiser.zero_grad()
        losses.sum().backward()  # seeds share nothing, so each gets the gradient of its own loss
        with torch.no_grad():
            for one in self.following():
                torch._foreach_lerp_(list(one.target.parameters()), list(one.online.parameters()), one.rate)
        self._optimiser.step()
        # Copies: a CUDA graph writes its next results over these.
        return {name: value.detach().clone() for name, value in {"loss": losses, **numbers}.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state` returned.

        Raises:
            CheckpointError: the state is not one of a learner with these settings.
        """
        super().restore(state)
        self._block = None

    def _rng_states(self) -> Sequence[Tensor]:
        # Draws are made for a block of updates at once, so going on begins with the block.
        return self._block_begins if self.step % BLOCK else super()._rng_states()

    def _loss_and_cast(self, batch: Batch, draws: Any) -> Losses:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return self.loss(batch, draws)


def _stacked(draws: Sequence[Any]) -> Any:
    """Return the seeds' draws as one, (U, S, B, ...)."""
    kind = type(draws[0])
    names = [one.name for one in dataclasses.fields(kind)]
    return kind(**{name: torch.stack([getattr(one, name) for one in draws], 1) for name in names})


def _row(draws: Any, index: int) -> Any:
    """Return the draws of one update, (S, B, ...)."""
    names = [one.name for one in dataclasses.fields(draws)]
    return type(draws)(**{name: getattr(draws, name)[index] for name in names})


def expectile_loss(difference: Tensor, expectile: float) -> Tensor:
    """Return |expectile - 1(difference < 0)| difference^2, entry by entry (IQL, arXiv 2110.06169, equation 5)."""
    weight = torch.where(difference >= 0, expectile, 1 - expectile)
    return weight * difference.square()


def velocity_inputs(observations: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """Concatenate observations (..., O), flat states (..., D) and times (...) as the official fields take them."""
    return torch.cat([observations, x, t[..., None]], dim=-1)
