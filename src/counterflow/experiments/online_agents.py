"""What each online algorithm does in the loop: acts, keeps what came of it, learns, and says what it has become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from counterflow.data.replay import Replay
from counterflow.envs import VectorEnv
from counterflow.errors import InvalidInputError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.online_data import Prefilled, Proposals, executed_of
from counterflow.experiments.online_settings import OnlineRun
from counterflow.experiments.steering_env import SteeredRows, Step
from counterflow.flow import denoise
from counterflow.learning.dsrl import AliasingLearner, AnchorsLearner, DSRLConfig, DSRLLearner
from counterflow.learning.residual import Compose, ResidualConfig, ResidualLearner
from counterflow.learning.rfs import RFSConfig, RFSLearner, Rollout
from counterflow.learning.sac import ActionSizes, SACLearner
from counterflow.policies import BasePolicy, bind
from counterflow.random import RowGenerators, child_seed, draw_normal, draw_prior, generator
from counterflow.reasoners import Direction, Reasoner
from counterflow.steering import (
    ActorConfig,
    SteeredPolicy,
    SteeringActor,
    SteeringContext,
    SteeringSpace,
    binding_of,
    steer_actor,
)
from counterflow.steering.start import Rng


class Agent(ABC):
    """What an algorithm does in the loop."""

    learner: SACLearner[Any] | RFSLearner

    @abstractmethod
    def act(self, rows: SteeredRows, decision: int) -> Tensor:
        """Return the actions (N, D) of all rows, exploring."""

    @abstractmethod
    def observe(self, shown: Tensor, actions: Tensor, made: Step) -> dict[str, Tensor]:
        """Keep what came of them, and learn; return numbers (S,), or nothing where nothing was learned."""

    @abstractmethod
    def acting(self, index: int) -> SteeredPolicy:
        """Return the steered policy that a seed has become."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""

    @abstractmethod
    def actor(self, index: int) -> SteeringActor | None:
        """Return a seed's actor, or None where there is none."""

    @property
    def settled(self) -> bool:
        """Whether everything that is known lies in the state."""
        return True

    evaluations = 0.0
    queries = 0.0
    updates = 0


class OffPolicyAgent(Agent):
    """DSRL and residual RL: a replay, and several updates a decision.

    Args:
        algorithm: "dsrl" or "residual".
        vector: the simulators.
        space: what an action means.
        rows: the episodes that go on.
        config: settings of the algorithm.
        settings: of the run.
        seeds: trained side by side.
        device: where to learn.
        data: what the replay begins with.
    """

    def __init__(
        self,
        algorithm: str,
        vector: VectorEnv,
        space: SteeringSpace,
        rows: SteeredRows,
        config: DSRLConfig | ResidualConfig,
        settings: OnlineRun,
        seeds: list[int],
        device: torch.device,
        data: Prefilled | None,
    ) -> None:
        self.space, self.config, self.settings, self.seeds, self.device = space, config, settings, seeds, device
        self.vector, self.rows = vector, rows
        spec = space.policy.action_spec
        shown = rows.shown.shape[1]
        sizes = ActionSizes(shown, space.limits, space.executed * spec.dim)
        self.learner: SACLearner[Any] = self._learner(sizes)
        self.replay = Replay(
            (shown, space.size, sizes.executed),
            len(seeds),
            settings.num_envs,
            max(settings.capacity, 0 if data is None else len(data.recorded) + settings.num_envs),
            None if data is None else data.recorded,
            device,
        )
        self.reasoners: list[Reasoner] = []
        self._asked: list[tuple[int, int]] = []
        self.proposals: Proposals | None = None
        anchors = isinstance(config, DSRLConfig) and config.variant == "anchors"
        if anchors or settings.keep_steering:
            self.proposals = Proposals(space, settings.particles, settings.spread, settings.steps)
        if settings.keep_steering or (anchors and settings.reasoner):
            if algorithm != "dsrl":
                raise InvalidInputError(f"keep_steering is for dsrl; {algorithm} was asked for.")
            make = ReasonerSettings().maker(vector.spec.name)
            self.reasoners = [make() for _ in range(len(rows))]
            self._asked = [(-1, -1)] * len(rows)

    def _learner(self, sizes: ActionSizes) -> SACLearner[Any]:
        space, config = self.space, self.config
        if isinstance(config, ResidualConfig):
            base, compose = composing(space)
            return ResidualLearner(sizes, config, self.seeds, self.device, base=base, compose=compose)
        if config.variant == "anchors":
            return AnchorsLearner(sizes, config, self.seeds, self.device)
        if config.variant == "aliasing":
            space.context_of(
                torch.zeros(1, sizes.observation)
            )  # a policy that can't is refused before anything is begun
            return AliasingLearner(sizes, config, self.seeds, self.device, decode=self._decode)
        return DSRLLearner(sizes, config, self.seeds, self.device)

    def _decode(self, observations: Tensor, latents: Tensor) -> Tensor:
        """Return what is executed (N, C) of latents (N, D) at what was seen (N, F)."""
        space, spec = self.space, self.space.policy.action_spec
        fresh = torch.zeros((len(latents), spec.horizon, spec.state_dim), device=latents.device)
        if space.latent.kind == "low_rank" and space.latent.rest == "prior":
            fresh.normal_(generator=self._rest)
        with torch.no_grad():
            noise = space.noise(space.split(latents)[0], fresh)
            made = denoise(bind(space.policy, space.context_of(observations)), noise, space.steps, space.solver)
            limited = spec.normalise(spec.limit(spec.denormalise(made)))
        self.evaluations += len(latents) * space.steps
        return executed_of(space, limited)

    @property
    def _rest(self) -> torch.Generator:
        # Stateless: what it draws depends on how far the learning is, so that going on draws the same.
        return generator(child_seed(self.seeds[0], "rest", self.learner.step), self.device)

    def act(self, rows: SteeredRows, decision: int) -> Tensor:
        """Return actions (N, D): the base's own in the warm-up, then the learner's."""
        seeds, streams = len(self.seeds), self.settings.num_envs
        shown = rows.shown.to(self.device).unflatten(0, (seeds, streams))
        if isinstance(self.learner, AnchorsLearner):
            return self._choose(rows, shown, decision).flatten(0, 1)
        if decision < self.config.warmup:
            return self._as_the_base(decision).flatten(0, 1)
        actions = self.learner.act(shown)
        if isinstance(self.config, ResidualConfig):
            actions = actions * self.config.size_at(decision)
        elif self.settings.keep_steering and self.proposals is not None:
            own = self.proposals.reverse(rows.context, self._ask(rows), self._rngs(decision))
            self._count_proposals()
            limits = self.space.limits.to(self.device)
            steered = own.to(self.device).clamp(-limits, limits).unflatten(0, (seeds, streams))
            values = self._values(shown, torch.stack([actions, steered], 2))
            actions = torch.where((values[..., 1] > values[..., 0])[..., None], steered, actions)
        return actions.flatten(0, 1)

    def _as_the_base(self, decision: int) -> Tensor:
        """Return the base policy's own: latents of the prior, within the bound, and no residual; (S, E, D)."""
        shape = (self.settings.num_envs, self.space.size)
        rngs = [generator(child_seed(seed, "warm-up", decision)) for seed in self.seeds]
        actions = torch.stack([torch.randn(shape, generator=rng) for rng in rngs])
        actions[..., self.space.latent_size :] = 0
        limits = self.space.limits
        return actions.clamp(-limits, limits).to(self.device)

    def _choose(self, rows: SteeredRows, shown: Tensor, decision: int) -> Tensor:
        assert self.proposals is not None
        assert isinstance(self.learner, AnchorsLearner)
        said = self._ask(rows) if self.reasoners else None
        latents, weights = self.proposals.candidates(rows.context, len(rows), self._rngs(decision), said)
        self._count_proposals()
        return self._best(shown, latents, weights if said is not None else None, explore=True)

    def _best(
        self,
        shown: Tensor,
        latents: Tensor,
        weights: Tensor | None,
        *,
        explore: bool,
        index: int | None = None,
    ) -> Tensor:
        """Return the chosen latents (S, E, D) of candidates (S E, N, D); for one seed alone where `index` says so."""
        learner = self.learner
        assert isinstance(learner, AnchorsLearner)
        seeds = len(self.seeds)
        wide = latents.to(self.device)
        executed = torch.zeros((*wide.shape[:2], learner.sizes.executed), device=self.device)
        if isinstance(self.config, DSRLConfig) and self.config.judged == "chunk":
            seen = shown.flatten(0, 1).repeat_interleave(wide.shape[1], 0)
            executed = self._decode(seen, wide.flatten(0, 1)).unflatten(0, wide.shape[:2])
        shape = (seeds, shown.shape[1]) if index is None else (1, shown.shape[1])
        parts = [wide.unflatten(0, shape), executed.unflatten(0, shape)]
        if index is not None:  # all critics judge, one seed's is listened to
            parts = [part.expand(seeds, *part.shape[1:]) for part in parts]
            shown = shown.expand(seeds, -1, -1)
        scores = learner.scores(shown, *parts)
        opinion = None if weights is None else weights.to(self.device).unflatten(0, shape).expand(scores.shape)
        chosen = learner.choose(parts[0], scores, opinion, explore=explore)
        return chosen if index is None else chosen[index : index + 1]

    def _values(self, shown: Tensor, actions: Tensor) -> Tensor:
        """Return what the critics think of actions (S, E, N, D): the mean of the members, (S, E, N)."""
        count = actions.shape[2]
        seen = shown[:, :, None].expand(-1, -1, count, -1).flatten(1, 2)
        with torch.no_grad():
            judged = self.learner.judge(seen, actions.flatten(1, 2))
            values: Tensor = self.learner.networks["critic"].ensemble(judged)[..., 0].float().mean(1)
        return values.unflatten(1, (-1, count))  # type: ignore[no-any-return]

    def _ask(self, rows: SteeredRows) -> list[Direction]:
        batch = rows.env.present()
        said = []
        for row, reasoner in enumerate(self.reasoners):
            present = (row, rows.episodes[row])
            if self._asked[row] != present:
                reasoner.reset(child_seed(rows.seeds[row], "reasoner", rows.episodes[row]))
                self._asked[row] = present
            said.append(reasoner.decide(batch.view(row)))
        self.queries += len(said)
        return said

    def _rngs(self, decision: int) -> RowGenerators:
        return RowGenerators(
            [
                child_seed(seed, "proposals", stream, decision)
                for seed in self.seeds
                for stream in range(self.settings.num_envs)
            ]
        )

    def _count_proposals(self) -> None:
        assert self.proposals is not None
        self.evaluations += self.proposals.evaluations
        self.proposals.evaluations = 0

    def observe(self, shown: Tensor, actions: Tensor, made: Step) -> dict[str, Tensor]:
        """Keep what came of it, and learn once there is enough."""
        shape = (len(self.seeds), self.settings.num_envs)
        self.replay.add(
            shown.unflatten(0, shape),
            actions.unflatten(0, shape),
            executed_of(self.space, made.decided.chunk).unflatten(0, shape),
            made.rewards.unflatten(0, shape),
            made.discounts.unflatten(0, shape),
            made.shown.unflatten(0, shape),
            made.done.unflatten(0, shape),
            made.success.unflatten(0, shape),
        )
        if self.replay.added < self.config.warmup:
            return {}
        updates = self.config.update_ratio * self.settings.num_envs
        self.updates += updates
        return self.learner.update(self.replay, updates)

    def acting(self, index: int) -> SteeredPolicy:
        """Return the policy that a seed has become."""
        actor = self.actor(index)
        if actor is not None:
            return steer_actor(self.space.policy, actor)
        return SteeredPolicy(self.space.policy, start=_Chosen(self, index), steps=self.space.steps)

    def actor(self, index: int) -> SteeringActor | None:
        """Return a seed's actor; anchors have none."""
        if "actor" not in self.learner.networks:
            return None
        return actor_of(self.space, self.learner.networks["actor"].part(index, 1), "squashed")

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs."""
        return {f"learner.{name}": value for name, value in self.learner.state().items()} | {
            f"replay.{name}": value for name, value in self.replay.state().items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        self.learner.restore(under("learner.", state))
        self.replay.restore(under("replay.", state))


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A start: the candidate that a seed's critics think best (anchors)."""

    agent: OffPolicyAgent
    index: int

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        agent = self.agent
        assert agent.proposals is not None
        space, spec = agent.space, policy.action_spec
        _, shown = space.encode(torch.as_tensor(context.observation))
        latents, _ = agent.proposals.candidates(context.features, context.batch_size, rng)
        best = agent._best(shown[None].to(agent.device), latents, None, explore=False, index=self.index)
        fresh = torch.zeros((context.batch_size, spec.horizon, spec.state_dim), device=space.device)
        noise = space.noise(space.split(best[0])[0], fresh)
        return noise, noise.new_zeros(context.batch_size)


class RFSAgent(Agent):
    """RFS: rollouts, and a few passes over each; arguments as for `OffPolicyAgent`."""

    def __init__(
        self,
        space: SteeringSpace,
        rows: SteeredRows,
        config: RFSConfig,
        settings: OnlineRun,
        seeds: list[int],
        device: torch.device,
    ) -> None:
        self.space, self.config, self.settings, self.seeds = space, config, settings, seeds
        self.learner: RFSLearner = RFSLearner(
            rows.shown.shape[1], space.latent_size, space.limits[space.latent_size :], config, seeds, device
        )
        self._raw, self._densities = torch.empty(0), torch.empty(0)
        self._turns: list[tuple[Tensor, ...]] = []

    def act(self, rows: SteeredRows, decision: int) -> Tensor:
        """Return actions (N, D): the base's own in the warm-up, then the learner's."""
        shape = (len(self.seeds), self.settings.num_envs)
        self._raw, self._densities = self.learner.act(rows.shown.to(self.learner.device).unflatten(0, shape))
        return self.learner.executed(self._raw, self.config.size_at(decision)).flatten(0, 1)

    def observe(self, shown: Tensor, actions: Tensor, made: Step) -> dict[str, Tensor]:  # noqa: ARG002 - raw ones are kept
        """Keep what came of it; learn when a rollout is whole."""
        shape = (len(self.seeds), self.settings.num_envs)
        kept = [
            one.to(self.learner.device).unflatten(0, shape)
            for one in (shown, made.rewards, made.discounts, made.shown, made.done)
        ]
        self._turns.append((kept[0], self._raw, self._densities, *kept[1:]))
        if len(self._turns) < self.config.rollout:
            return {}
        rollout = Rollout(*(torch.stack(column) for column in zip(*self._turns, strict=True)))
        self._turns = []
        before = self.learner.step
        numbers = self.learner.update(rollout)
        self.updates += self.learner.step - before
        return numbers

    @property
    def settled(self) -> bool:
        """Whether no rollout has begun that isn't in the state."""
        return not self._turns

    def acting(self, index: int) -> SteeredPolicy:
        """Return the policy that a seed has become."""
        return steer_actor(self.space.policy, self.actor(index))

    def actor(self, index: int) -> SteeringActor:
        """Return a seed's actor."""
        actor = actor_of(self.space, self.learner.policy.part(index, 1), "gaussian")
        actor.log_std.copy_(self.learner.log_std.detach()[index, 0])
        return actor

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs."""
        return {f"learner.{name}": value for name, value in self.learner.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        self.learner.restore(under("learner.", state))


def composing(space: SteeringSpace) -> tuple[int, Compose]:
    """Return how many numbers a base's chunk has, and how base and residual become what is executed."""
    spec = space.policy.action_spec
    shape = (spec.horizon, spec.state_dim)

    def compose(base: Tensor, residual: Tensor) -> Tensor:
        made = space.compose(base.unflatten(1, shape), residual.unflatten(1, (space.executed, spec.dim)))
        return spec.normalise(made)[..., : spec.dim].flatten(1)

    return shape[0] * shape[1], compose


def actor_of(space: SteeringSpace, network: Any, law: Literal["squashed", "gaussian"]) -> SteeringActor:
    """Return one seed's network as the actor that steers."""
    spec = space.policy.action_spec
    given = space.residual_bound
    bounds = (float(given),) * spec.dim if isinstance(given, int | float) else tuple(float(one) for one in given)
    config = ActorConfig(
        law,
        space.ports,
        space.bound,
        space.latent,
        bounds,
        space.show_base,
        network.hidden,
        network.norm,
        network.activation,
    )
    actor = SteeringActor(config, network.inputs, space.size, binding_of(space.policy, space.steps, space.solver))
    actor.network.load_state_dict(network.state_dict())
    return actor.to(space.device).requires_grad_(False).eval()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what lies under a prefix, by the rest of its name."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


@dataclass(frozen=True, eq=False)
class PriorLatent:
    """A start: coefficients of N(0, I) within the bound, in the latent's shape: what a learner begins with."""

    space: SteeringSpace

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the noise at t = 0."""
        space, spec = self.space, policy.action_spec
        shape = (context.batch_size, spec.horizon, spec.state_dim)
        fresh = draw_prior(rng, shape, space.device, spec.prior)
        actions = torch.zeros((context.batch_size, space.size), device=space.device)
        own = draw_normal(rng, (context.batch_size, space.latent_size), space.device)
        actions[:, : space.latent_size] = own
        return space.noise(space.split(actions)[0], fresh), fresh.new_zeros(context.batch_size)
