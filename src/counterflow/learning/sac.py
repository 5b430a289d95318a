"""Soft actor-critic (arXiv 1801.01290, 1812.05905) for many seeds at once: the core of DSRL and of residual RL.

    critic       L = E (Q_m(s, a) - y)^2,   y = r + d (agg_m Q'_m(s', a') - alpha log pi(a' | s')),   a' ~ pi(s')
    actor        L = E [ alpha log pi(a | s) - agg_m Q_m(s, a) ],   a = limit * tanh(mean + std * noise)
    temperature  L = -log alpha E [ log pi(a | s) + target entropy ]

r is the return over a chunk (or n of them) and d what the next value counts: gamma^executed, 0 where the task was solved. A time
limit is no end. The density is that of the squashed action divided by its limits, so that target entropies don't depend on them.

Seeds are the leading dimension S of everything, critics are a batch dimension, and a seed's draws come from its own generator.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from counterflow.checks import POSITIVE, RATE, Range, check_name, check_numbers
from counterflow.data.replay import Mix, Replay, ReplayBatch
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.learning.bc import Precision, can_compile, choose_precision
from counterflow.learning.state import Resumable
from counterflow.policies import as_device
from counterflow.policies.stacked import Activation, StackedMLP
from counterflow.random import check_seed, child_seed, generator
from counterflow.steering.actor import LOG_STD, MIDDLE, parameters

INSIDE = 0.98
"""How far inside the tanh's range a label is clipped before its density is taken: beyond, log pi breaks."""
FIRST = 0.01
"""How much of its usual size an actor's last layer begins with. One that begins sure of itself gives the first labels so small a
density that their gradients fill the optimiser's memory for thousands of updates."""
IMITATED_STD = 0.3
"""The deviation, in units of the action (of its limits, where these are below 1), with which an actor begins that imitates. Left
to the likelihood it vanishes, since what is imitated says one action for a state, and then every recorded action that differs is
a catastrophe to it. Of noises, whose prior has 1, this much costs a noise policy little."""
Losses = tuple[Tensor, dict[str, Tensor]]
"""The loss of every seed (S,), and what is worth watching, each (S,)."""


@dataclass(frozen=True)
class SACConfig:
    """Settings of SAC and of what is made of it.

    Attributes:
        discount: gamma of an environment step.
        n_step: chunks over which returns are summed.
        batch_size: decisions in an update.
        update_ratio: updates for each decision that a seed makes (the update-to-data ratio).
        warmup: decisions of a seed before learning begins, made as the base policy does, or as the teacher; by anchors, which
            have nobody to begin as, as critics choose that know nothing yet.
        learning_rate: of the critics.
        actor_learning_rate: of the actor.
        temperature_learning_rate: of the temperature.
        target_rate: tau, by which target critics follow.
        width: neurons of a hidden layer.
        depth: hidden layers.
        activation: of all networks.
        layer_norm: of all networks.
        members: M, critics.
        subset: how many of them, drawn anew in every update, an aggregate is of; 0: all.
        aggregation: of the critics' values: "min" or "mean".
        entropy_backup: whether the entropy is part of the critics' target.
        lowest_value: what a value can't be below, for example 0 where rewards are 0 and 1; targets take over none below it.
        highest_value: what it can't be above.
        actor_delay: updates before the actor (and the temperature) follow the critics, which know nothing yet; until then it
            imitates, where there is something to imitate (`bc_weight`).
        initial_std: of the actor's Gaussian at the start: with 1 a latent begins as near N(0, 1) as its bound lets it; that of a
            residual, whose bound is below 1, is in units of its bound.
        initial_temperature: alpha at the start.
        learn_temperature: False keeps it there.
        temperature_floor: the temperature never falls below (noise aliasing dips when it does too early).
        target_entropy: of the whole action; None: minus half its size, or that of the teacher's Gaussian, before the squashing,
            where there is one.
        prefilled_share: of a batch, from prefilled decisions.
        success_share: of a batch, from successful episodes.
        bc_weight: lambda of -log pi, divided by how many numbers an action has, over the actions of successful episodes; added to
            the actor's loss.
        bc_batch: examples of it in an update; of a teacher's no more than the batch has.
        bc_decay: updates over which its weight falls to nothing; 0: it stays.
        bc_from: whose actions: of successful episodes that were "prefilled", of "all" successful ones, or what a "teacher" says
            wherever the replay has been (`SACLearner.teacher`); then the term is the divergence of the actor from the teacher's
            law, its answer with a deviation of `IMITATED_STD`.
        precision: of the networks' arithmetic.
        compile: whether to compile losses and gradients.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: no such name.
    """

    discount: float = 0.99
    n_step: int = 1
    batch_size: int = 256
    update_ratio: int = 20
    warmup: int = 100
    learning_rate: float = 3e-4
    actor_learning_rate: float = 3e-4
    temperature_learning_rate: float = 3e-4
    target_rate: float = 0.005
    width: int = 256
    depth: int = 3
    activation: Activation = "tanh"
    layer_norm: bool = True
    members: int = 2
    subset: int = 0
    aggregation: Literal["min", "mean"] = "min"
    entropy_backup: bool = True
    lowest_value: float | None = None
    highest_value: float | None = None
    actor_delay: int = 0
    initial_std: float = 1.0
    initial_temperature: float = 1.0
    learn_temperature: bool = True
    temperature_floor: float = 0.0
    target_entropy: float | None = None
    prefilled_share: float = 0.5
    success_share: float = 0.0
    bc_weight: float = 0.0
    bc_batch: int = 16
    bc_decay: int = 0
    bc_from: Literal["prefilled", "all", "teacher"] = "prefilled"
    precision: Precision = "float32"
    compile: bool = True

    def __post_init__(self) -> None:
        """Check every setting."""
        check_numbers(self, or_zero=("warmup", "subset", "actor_delay", "bc_decay", "imitation", "ramp"))
        RATE.check_all(
            self, "discount", "learning_rate", "actor_learning_rate", "temperature_learning_rate", "target_rate"
        )
        POSITIVE.check_all(self, "initial_temperature")
        Range(math.exp(LOG_STD[0]), math.exp(LOG_STD[1]), above=True, below=True).check_all(self, "initial_std")
        if self.subset > self.members:
            raise InvalidInputError(
                f"subset is {self.subset} of {self.members} members; expected no more than there are."
            )
        for name, known in (("aggregation", ("min", "mean")), ("bc_from", ("prefilled", "all", "teacher"))):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        check_name("activation", self.activation, Activation)
        bounds = (self.lowest_value, self.highest_value)
        if bounds != (None, None) and self.entropy_backup:
            raise InvalidInputError(
                f"values are said to lie within {bounds}, and the entropy is part of them; expected entropy_backup=false."
            )
        if None not in bounds and not self.lowest_value < self.highest_value:  # type: ignore[operator]
            raise InvalidInputError(f"values are said to lie within {bounds}; expected the lower one first.")
        self.mix()

    def mix(self) -> Mix:
        """Return what a batch is made of."""
        return Mix(self.prefilled_share, self.success_share)

    def bc_weight_at(self, step: int) -> float:
        """Return the weight of the behaviour cloning term after `step` updates."""
        return self.bc_weight * (max(0.0, 1 - step / self.bc_decay) if self.bc_decay else 1.0)


@dataclass(frozen=True, eq=False)
class ActionSizes:
    """What a learner sees and decides on.

    Attributes:
        observation: F.
        limits: (D,) the largest size of each number of an action.
        executed: C, numbers of what is executed.

    Raises:
        InvalidInputError: a limit is not positive and finite: a squashed policy needs one.
    """

    observation: int
    limits: Tensor
    executed: int = 0

    def __post_init__(self) -> None:
        """Check the limits."""
        if self.limits.ndim != 1 or not bool(((self.limits > 0) & torch.isfinite(self.limits)).all()):
            raise InvalidInputError(
                f"the actions' limits are {self.limits.tolist()}; a squashed policy needs positive, finite ones. Give a noise "
                "bound, and residual bounds above zero."
            )

    @property
    def action(self) -> int:
        """D."""
        return len(self.limits)


@dataclass(frozen=True)
class SACDraws:
    """What is random in an update, seeds first.

    Attributes:
        next_noise: (S, B, D) of the next action.
        noise: (S, B, D) of the action that is judged.
        order: (S, M) of which the smallest choose the members of a subset.
        extra: (S, ...) what a learner draws beside these.
        rest: (S, ...) what the frozen flow draws of the prior, where a learner asks it.
    """

    next_noise: Tensor
    noise: Tensor
    order: Tensor
    extra: Tensor
    rest: Tensor


def squash(outputs: Tensor, noise: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Return actions (..., D) and their log-density (...) of a squashed Gaussian.

    Args:
        outputs: (..., 2 D) what the actor says.
        noise: (..., D) draws of N(0, I).
        limits: (D,).
    """
    mean, log_std = parameters(outputs)
    raw = mean + log_std.exp() * noise
    density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    # log(1 - tanh^2), written so that it does not underflow
    density = density - 2 * (math.log(2) - raw - functional.softplus(-2 * raw))
    return limits * torch.tanh(raw), density.sum(-1)


def log_density(outputs: Tensor, actions: Tensor, limits: Tensor) -> Tensor:
    """Return the log-density (...) of given actions (..., D), clipped inside the tanh's range."""
    mean, log_std = parameters(outputs)
    unit = (actions / limits).clamp(-INSIDE, INSIDE)
    noise = (torch.atanh(unit) - mean) / log_std.exp()
    density = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - torch.log1p(-unit.square())
    return density.sum(-1)


def aggregated(values: Tensor, config: SACConfig, order: Tensor) -> Tensor:
    """Return values (S, M, B) as one, (S, B): the least or the mean of all members, or of a random subset (REDQ)."""
    if config.subset and config.subset < values.shape[1]:
        chosen = order.argsort(1)[:, : config.subset, None].expand(-1, -1, values.shape[2])
        values = values.gather(1, chosen)
    return values.amin(1) if config.aggregation == "min" else values.mean(1)


Judge = Callable[[Tensor, Tensor], Tensor]
"""What critics look at: (observations (S, B, F), actions (S, B, D)) -> (S, B, I)."""


def backed_up(following: Tensor, temperature: Tensor, density: Tensor, config: SACConfig) -> Tensor:
    """Return what targets take over of the next values (S, B): with the entropy, or within what values can be.

    Args:
        following: (S, B) aggregated values.
        temperature: (S,).
        density: (S, B) log-densities of the actions that they are of.
        config: the settings.
    """
    if config.entropy_backup:
        return following - temperature[:, None] * density
    return within(following, config)


def within(values: Tensor, config: SACConfig) -> Tensor:
    """Return values clipped to what they can be, as far as that is known."""
    if config.lowest_value is None and config.highest_value is None:
        return values
    return values.clamp(config.lowest_value, config.highest_value)


def critic_loss(
    critic: StackedMLP,
    target: StackedMLP,
    actor: StackedMLP,
    temperature: Tensor,
    judge: Judge,
    batch: ReplayBatch,
    draws: SACDraws,
    config: SACConfig,
    limits: Tensor,
) -> Losses:
    """Return the critics' loss of every seed (S,)."""
    with torch.no_grad():
        action, density = squash(actor(batch.next_observations), draws.next_noise, limits)
        following = aggregated(
            target.ensemble(judge(batch.next_observations, action))[..., 0].float(), config, draws.order
        )
        following = backed_up(following, temperature, density, config)
        wanted = batch.rewards + batch.discounts * following
    values = critic.ensemble(judge(batch.observations, batch.actions))[..., 0].float()
    return (values - wanted[:, None]).square().mean((1, 2)), {"value": values.mean((1, 2))}


def actor_loss(
    critic: StackedMLP,
    actor: StackedMLP,
    temperature: Tensor,
    judge: Judge,
    observations: Tensor,
    draws: SACDraws,
    config: SACConfig,
    limits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the actor's loss of every seed (S,), and the log-density of its actions (S, B), without gradient."""
    action, density = squash(actor(observations), draws.noise, limits)
    values = aggregated(critic.ensemble(judge(observations, action), frozen=True)[..., 0].float(), config, draws.order)
    return (temperature[:, None] * density - values).mean(1), density.detach()


def temperature_loss(log_temperature: Tensor, density: Tensor, target_entropy: float) -> Tensor:
    """Return the temperature's loss of every seed (S,)."""
    return -(log_temperature[:, None] * (density + target_entropy)).mean(1)


def cloning_loss(actor: StackedMLP, observations: Tensor, actions: Tensor, limits: Tensor) -> Tensor:
    """Return -log pi of given actions, a number of the action at a time, for every seed (S,)."""
    return -log_density(actor(observations), actions, limits).mean(1) / actions.shape[-1]


def unsquash(actions: Tensor, limits: Tensor) -> Tensor:
    """Return what actions (..., D) are before the squashing, clipped inside the tanh's range."""
    return torch.atanh((actions / limits).clamp(-INSIDE, INSIDE))


def imitated_std(limits: Tensor) -> Tensor:
    """Return the deviation (D,), before the squashing, of an actor that imitates."""
    return IMITATED_STD / limits.clamp_min(1)


def divergence_loss(actor: StackedMLP, observations: Tensor, actions: Tensor, limits: Tensor) -> Tensor:
    """Return KL(teacher || pi), a number of the action at a time, for every seed (S,).

    The teacher's law is, before the squashing, a Gaussian around its answers with a deviation of `imitated_std`: in expectation
    over it this is `cloning_loss`, up to a constant, without its noise.

    Args:
        actor: the policy.
        observations: (S, B, F).
        actions: (S, B, D) what the teacher says there.
        limits: (D,).
    """
    mean, log_std = parameters(actor(observations))
    wanted, std = unsquash(actions, limits), imitated_std(limits)
    ratio = (std.square() + (mean - wanted).square()) / (2 * log_std).exp()
    return (log_std - std.log() + 0.5 * (ratio - 1)).mean((1, 2))


Teacher = Callable[[Tensor], Tensor]
"""What actors imitate, each seed's its own: observations (S, C, F) -> actions (S, C, D)."""
Config = TypeVar("Config", bound=SACConfig)
Result = TypeVar("Result")


class SACLearner(Resumable, Generic[Config]):
    """Trains actor and critics of S seeds together.

    Args:
        sizes: what is seen and decided on.
        config: the settings.
        seeds: one a run that is trained.
        device: where to train.

    Raises:
        InvalidInputError: no seed was given, or one twice, or a limit is not positive.
    """

    name: ClassVar[str] = "sac"

    def __init__(
        self, sizes: ActionSizes, config: Config, seeds: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        if not seeds or len({*seeds}) != len(seeds):
            raise InvalidInputError(f"the seeds are {tuple(seeds)}; expected one or more different ones.")
        self.sizes, self.config, self.seeds = sizes, config, tuple(check_seed(seed) for seed in seeds)
        self.device, self.step = as_device(device), 0
        self.teacher: Teacher | None = None  # set by who has one, before anything is learned
        self.limits = sizes.limits.to(self.device)
        self.listening = torch.ones((), device=self.device)  # 0 while the actor does not follow the critics yet
        self.target_entropy = self._default_entropy() if config.target_entropy is None else config.target_entropy
        self.networks = self.build()
        weights = [generator(child_seed(seed, "weights")) for seed in self.seeds]
        followed = {id(target) for _, target in self.following()}
        for network in self.networks.values():
            if id(network) not in followed:
                network.reset(weights)
        if "actor" in self.networks:
            with torch.no_grad():
                actor, (low, high) = self.networks["actor"], LOG_STD
                actor.weights[-1].mul_(FIRST)
                # A latent begins as near N(0, 1) as its bound lets it: bound * tanh(noise / bound).
                wanted = (config.initial_std / sizes.limits.clamp_min(1)).log().clamp(low + 0.01, high - 0.01)
                actor.biases[-1][..., sizes.action :] = torch.atanh(2 * (wanted - low) / (high - low) - 1) - MIDDLE
        for online, target in self.following():
            target.load_state_dict(online.state_dict())
            target.requires_grad_(False)
        self._modules = nn.ModuleDict(self.networks)
        start = torch.full((len(self.seeds),), math.log(config.initial_temperature))
        self._modules.register_parameter("log_temperature", nn.Parameter(start, requires_grad=config.learn_temperature))
        self._modules.to(self.device)
        self.log_temperature: Tensor = self._modules.log_temperature  # type: ignore[assignment]
        rates = {"actor": config.actor_learning_rate, "log_temperature": config.temperature_learning_rate}
        groups: dict[float, list[nn.Parameter]] = {}  # one a rate: a step of each costs a call
        for name, parameter in self._modules.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rates.get(name.split(".")[0], config.learning_rate), []).append(parameter)
        self._optimiser = torch.optim.Adam([{"params": own, "lr": rate} for rate, own in groups.items()], fused=True)
        self._rngs = [generator(child_seed(seed, self.name), self.device) for seed in self.seeds]
        self.precision = choose_precision(config.precision, self.device)
        self.compiled = config.compile and can_compile(self.device)
        self._loss = self._compiled(self._cast(self.loss))

    def _default_entropy(self) -> float:
        if self.config.bc_from != "teacher":
            return -self.sizes.action / 2
        return float((imitated_std(self.sizes.limits).log() + 0.5 * math.log(2 * math.pi * math.e)).sum())

    def _compiled(self, function: Callable[..., Result]) -> Callable[..., Result]:
        if not self.compiled:
            return function
        compiled: Callable[..., Result] = torch.compile(
            function, mode="reduce-overhead" if self.device.type == "cuda" else None
        )
        return compiled

    def _cast(self, function: Callable[..., Result]) -> Callable[..., Result]:
        def cast(*arguments: Any) -> Result:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
                return function(*arguments)

        return cast

    @property
    def judged_size(self) -> int:
        """I, what critics look at."""
        return self.sizes.observation + self.sizes.action

    def judge(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Return what critics look at, (S, B, I): the observation, and the action in units of its limits."""
        return torch.cat([observations, actions / self.limits], -1)

    def network(self, inputs: int, outputs: int, count: int) -> StackedMLP:
        """Make a stack of networks with this configuration's sizes."""
        config = self.config
        norm: Literal["before", "none"] = "before" if config.layer_norm else "none"
        return StackedMLP(inputs, outputs, count, config.width, config.depth, norm, activation=config.activation)

    def build(self) -> dict[str, StackedMLP]:
        """Make every network by name, targets included."""
        seeds = len(self.seeds)
        return {
            "actor": self.network(self.sizes.observation, 2 * self.sizes.action, seeds),
            "critic": self.network(self.judged_size, 1, seeds * self.config.members),
            "target_critic": self.network(self.judged_size, 1, seeds * self.config.members),
        }

    def following(self) -> list[tuple[StackedMLP, StackedMLP]]:
        """Say which networks targets follow: (online, target)."""
        return [(self.networks["critic"], self.networks["target_critic"])]

    @property
    def temperature(self) -> Tensor:
        """(S,) alpha, without gradient."""
        return self.log_temperature.detach().exp().clamp_min(self.config.temperature_floor)

    def draw(self, rng: torch.Generator, updates: int) -> SACDraws:
        """Draw what is random in one seed's next updates, (U, B, ...)."""
        shape = (updates, self.config.batch_size, self.sizes.action)
        return SACDraws(
            torch.randn(shape, generator=rng, device=self.device),
            torch.randn(shape, generator=rng, device=self.device),
            torch.rand((updates, self.config.members), generator=rng, device=self.device),
            torch.zeros((updates, 0), device=self.device),
            torch.zeros((updates, 0), device=self.device),
        )

    def loss(self, batch: ReplayBatch, draws: SACDraws, shown: Tensor, acted: Tensor, cloning: Tensor) -> Losses:
        """Return the loss of every seed (S,), all networks' together: none gets another's gradient.

        Args:
            batch: decisions.
            draws: what is random.
            shown: (S, C, F) what was seen in successful episodes, or of a teacher in the batch.
            acted: (S, C, D) and done there, or what the teacher says.
            cloning: (S,) the weight of doing the same.
        """
        actor, critic, temperature = self.networks["actor"], self.networks["critic"], self.temperature
        judging, numbers = critic_loss(
            critic,
            self.networks["target_critic"],
            actor,
            temperature,
            self.judge,
            batch,
            draws,
            self.config,
            self.limits,
        )
        acting, density = actor_loss(
            critic, actor, temperature, self.judge, batch.observations, draws, self.config, self.limits
        )
        numbers |= {"critic_loss": judging, "actor_loss": acting, "entropy": -density.mean(1)}
        if self.config.learn_temperature:
            acting = acting + temperature_loss(self.log_temperature, density, self.target_entropy)
        total = judging + self.listening * acting
        if self.config.bc_weight:
            copying = self.copying_loss(shown, acted)
            total, numbers["bc_loss"] = total + cloning * copying, copying
        return total, numbers

    def copying_loss(self, shown: Tensor, acted: Tensor) -> Tensor:
        """Return the loss (S,) of doing what was done, or what a teacher says, there."""
        loss = divergence_loss if self.config.bc_from == "teacher" else cloning_loss
        return loss(self.networks["actor"], shown, acted, self.limits)

    def update(self, replay: Replay, updates: int) -> dict[str, Tensor]:
        """Take several steps of every seed; return means of its numbers, each (S,), without waiting for the device.

        Decisions and draws of all steps are drawn at once.
        """
        places = replay.draw(self._rngs, updates, self.config.batch_size, self.config.mix())
        draws = _stacked([self.draw(rng, updates) for rng in self._rngs])
        copied, known = self._copied(replay, updates)
        found: list[dict[str, Tensor]] = []
        for index in range(updates):
            batch = replay.gather(places[index], self.config.n_step)
            own = SACDraws(*(getattr(draws, one.name)[index] for one in dataclasses.fields(draws)))
            if self.config.bc_weight and self.config.bc_from == "teacher":
                shown = self._some(batch.observations)
                acted = self._taught(shown)
            elif copied is None:
                shown, acted = batch.observations[:, :0], batch.actions[:, :0]
            else:
                examples = replay.gather(copied[index])
                shown, acted = examples.observations, examples.actions
            found.append(self.apply(batch, own, shown, acted, known * self.config.bc_weight_at(self.step)))
            self.step += 1
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    def apply(
        self, batch: ReplayBatch, draws: SACDraws, shown: Tensor, acted: Tensor, cloning: Tensor
    ) -> dict[str, Tensor]:
        """Take one step with given draws."""
        self.begin_step()
        losses, numbers = self._loss(batch, draws, shown, acted, cloning)
        self.optimise(losses)
        self.follow()
        numbers = {"loss": losses, "temperature": self.temperature, **numbers}
        return {
            name: value.detach().clone() for name, value in numbers.items()
        }  # the next step's graph writes over them

    def begin_step(self) -> None:
        """Let go of what the last step's graphs hold; say whether the actor follows the critics."""
        self.listening.fill_(float(self.step >= self.config.actor_delay))
        if self.compiled and self.device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()

    def optimise(self, losses: Tensor) -> None:
        """Take a step of the networks that losses (S,) depend on; seeds share nothing, so each gets its own gradient."""
        self._optimiser.zero_grad()
        losses.sum().backward()
        self._optimiser.step()
        if self.config.learn_temperature and self.config.temperature_floor:
            # Left to itself it goes on falling where nobody sees it, and is as long in coming back.
            self.log_temperature.detach().clamp_(min=math.log(self.config.temperature_floor))

    @torch.no_grad()
    def follow(self) -> None:
        """Let targets follow."""
        for online, target in self.following():
            torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), self.config.target_rate)

    @torch.no_grad()
    def act(self, observations: Tensor, *, explore: bool = True) -> Tensor:
        """Return actions (S, E, D) for observations (S, E, F): drawn, or the means."""
        outputs = self.networks["actor"](observations)
        shape = (*observations.shape[1:-1], self.sizes.action)
        noise = [torch.randn(shape, generator=rng, device=self.device) * float(explore) for rng in self._rngs]
        return squash(outputs, torch.stack(noise), self.limits)[0]

    def imitate(self, observations: Tensor, updates: int) -> Tensor:
        """Begin the actors as imitations of the teacher, with a deviation of `imitated_std`; return the last loss (S,).

        Args:
            observations: (N, F) where to.
            updates: steps of behaviour cloning.
        """
        losses = observations.new_zeros(len(self.seeds))
        actions = self._taught(observations.expand(len(self.seeds), -1, -1))
        each = torch.arange(len(self.seeds), device=self.device)[:, None]
        for _ in range(updates):
            rows = [
                torch.randint(len(observations), (self.config.batch_size,), generator=rng, device=self.device)
                for rng in self._rngs
            ]
            chosen = torch.stack(rows)
            mean, log_std = parameters(self.networks["actor"](observations[chosen]))
            wanted, std = unsquash(actions[each, chosen], self.limits), imitated_std(self.limits)
            # the deviation's part as a square: where it is far off, that of the divergence would drown the mean's
            errors = 0.5 * ((mean - wanted) / std).square() + (log_std - std.log()).square()
            losses = errors.mean((1, 2))
            self.optimise(losses)
        return losses.detach()

    def _some(self, observations: Tensor) -> Tensor:
        """Return `bc_batch` of a batch's observations (S, B, F), or all, spread over it: its parts lie one after another."""
        whole = observations.shape[1]
        count = min(whole, self.config.bc_batch)
        return observations[:, torch.arange(count, device=self.device) * whole // count]

    @torch.no_grad()
    def _taught(self, observations: Tensor) -> Tensor:
        """Return what the teacher says (S, C, D)."""
        if self.teacher is None:
            raise InvalidInputError(
                "bc_from is 'teacher', and there is none; expected a noise policy to imitate. Give one, or use 'prefilled'."
            )
        return self.teacher(observations).float()

    def _copied(self, replay: Replay, updates: int) -> tuple[Tensor | None, Tensor]:
        """Draw the successes to imitate, (U, S, C), and say which seeds have any, (S,)."""
        if not self.config.bc_weight:
            return None, torch.zeros(len(self.seeds), device=self.device)
        if self.config.bc_from == "teacher":
            return None, torch.ones(len(self.seeds), device=self.device)
        return replay.draw_successes(
            self._rngs, updates, self.config.bc_batch, prefilled_only=self.config.bc_from == "prefilled"
        )


def _stacked(draws: Sequence[SACDraws]) -> SACDraws:
    """Return the seeds' draws as one, (U, S, ...)."""
    return SACDraws(
        *(torch.stack([getattr(one, field.name) for one in draws], 1) for field in dataclasses.fields(SACDraws))
    )
