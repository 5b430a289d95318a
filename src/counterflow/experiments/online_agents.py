"""What each online algorithm does in the loop: acts, keeps what came of it, learns, and says what it has become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from counterflow.data.replay import Replay
from counterflow.envs import VectorEnv
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.online_data import Prefilled, anchors_of
from counterflow.experiments.online_settings import OnlineRun
from counterflow.experiments.online_teaching import Teachers
from counterflow.experiments.rollout import MakeReasoner
from counterflow.experiments.steering_env import SteeredRows, Step
from counterflow.flow import denoise
from counterflow.learning.dsrl import AliasingLearner, AnchorsLearner, Decode, DSRLConfig, DSRLLearner
from counterflow.learning.residual import Compose, ResidualConfig, ResidualLearner
from counterflow.learning.rfs import RFSConfig, RFSLearner, Rollout
from counterflow.learning.sac import ActionSizes, SACLearner
from counterflow.policies import BasePolicy, bind
from counterflow.random import RowGenerators, child_seed, draw_prior, generator
from counterflow.reasoners import Direction, Reasoner, to_reference
from counterflow.steering import (
    ActorConfig,
    AnchorsConfig,
    AnchorsCritic,
    Proposals,
    Reference,
    SteeredPolicy,
    SteeringActor,
    SteeringContext,
    SteeringSpace,
    binding_of,
    steer_actor,
    steer_anchors,
)
from counterflow.steering.anchors import executed_of_candidates
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
    def acting(self, index: int, decision: int) -> SteeredPolicy:
        """Return the steered policy that a seed has become after so many decisions."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs."""

    @abstractmethod
    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""

    @abstractmethod
    def artefact(self, index: int, decision: int) -> SteeringActor | AnchorsCritic:
        """Return what is left of a seed after so many decisions: an actor, or critics and the anchors among which they choose."""

    @property
    def make_reasoner(self) -> MakeReasoner | None:
        """Who speaks while a seed's policy acts, or None: nobody."""
        return None

    def remind(self, rows: SteeredRows, row: int, decision: int) -> None:  # noqa: B027 - nothing to remember is an answer
        """Be shown again what a row showed at an earlier decision, as a run goes on from its checkpoint."""

    evaluations = 0.0
    queries = 0.0
    updates = 0


class OffPolicyAgent(Agent):
    """DSRL and residual RL: a replay, and several updates a decision.

    Args:
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
            settings.capacity,
            None if data is None else data.recorded,
            device,
        )
        self.teachers: Teachers | None = None
        self.reasoners: list[Reasoner] = []
        self._asking = ReasonerSettings(settings.reasoner_error)
        self._asked: list[tuple[int, int]] = []
        self.proposals: Proposals | None = None
        anchors = isinstance(config, DSRLConfig) and config.variant == "anchors"
        if anchors or settings.keep_steering:
            self.proposals = Proposals(space, anchors_of(spec), settings.particles, settings.spread, settings.steps)
        self._weighted = anchors and settings.reasoner
        if settings.keep_steering or self._weighted:
            make = self._asking.maker(vector.spec.name)
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
            decode, rest = decoding(space)
            return AliasingLearner(sizes, config, self.seeds, self.device, decode=decode, rest=rest)
        return DSRLLearner(sizes, config, self.seeds, self.device)

    def taught_by(self, teachers: Teachers) -> None:
        """Let actors imitate noise policies; to be said before anything is learned."""
        self.teachers = self.learner.teacher = teachers

    def act(self, rows: SteeredRows, decision: int) -> Tensor:
        """Return actions (N, D): the base's own in the warm-up, or those of an actor that was taught, then the learner's."""
        seeds, streams = len(self.seeds), self.settings.num_envs
        shown = rows.shown.to(self.device).unflatten(0, (seeds, streams))
        if isinstance(self.learner, AnchorsLearner):
            return self._choose(rows, shown, decision).flatten(0, 1)
        if decision < self.config.warmup and self.learner.teacher is None:
            return self._as_the_base(decision).flatten(0, 1)
        actions = self.learner.act(shown)
        if decision < self.config.warmup:
            return actions.flatten(0, 1)
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
        """Return the chosen latents (S, E, D) of what is proposed."""
        learner, config = self.learner, self.config
        assert self.proposals is not None
        assert isinstance(learner, AnchorsLearner)
        assert isinstance(config, DSRLConfig)
        said = self._ask(rows) if self._weighted else None
        latents, weights = self.proposals.candidates(rows.context, len(rows), self._rngs(decision), said)
        self._count_proposals()
        shape = shown.shape[:2]
        executed = torch.zeros((*latents.shape[:2], learner.sizes.executed))
        if config.judged == "chunk":
            executed = executed_of_candidates(self.space, rows.context, latents, rows.fresh)
            self.evaluations += latents.shape[0] * latents.shape[1] * self.space.steps
        wide, made = (one.to(self.device).unflatten(0, shape) for one in (latents, executed))
        opinion = None if said is None else weights.to(self.device).unflatten(0, shape)
        return learner.choose(wide, learner.scores(shown, wide, made), opinion)

    def _values(self, shown: Tensor, actions: Tensor) -> Tensor:
        """Return what the critics think of actions (S, E, N, D): the mean of the members, (S, E, N)."""
        count = actions.shape[2]
        seen = shown[:, :, None].expand(-1, -1, count, -1).flatten(1, 2)
        with torch.no_grad():
            judged = self.learner.judge(seen, actions.flatten(1, 2))
            values: Tensor = self.learner.networks["critic"].ensemble(judged)[..., 0].float().mean(1)
        return values.unflatten(1, (-1, count))  # type: ignore[no-any-return]

    def _ask(self, rows: SteeredRows) -> Reference:
        """Ask about what is seen now on all rows."""
        said = [self._ask_about(rows, row) for row in range(len(rows))]
        self.queries += len(said)
        return to_reference(said, self.space.policy.action_spec)

    def _ask_about(self, rows: SteeredRows, row: int) -> Direction:
        reasoner, present = self.reasoners[row], (row, rows.episodes[row])
        if self._asked[row] != present:
            reasoner.reset(child_seed(rows.seeds[row], "reasoner", rows.episodes[row]))
            self._asked[row] = present
        return reasoner.decide(rows.env.present().view(row))

    def remind(self, rows: SteeredRows, row: int, decision: int) -> None:
        """Let a row's reasoner see again what it saw at an earlier decision: it may remember what it is about."""
        if self.reasoners and (self._weighted or decision >= self.config.warmup):
            self._ask_about(rows, row)

    @property
    def make_reasoner(self) -> MakeReasoner | None:
        """Who speaks while a seed's policy acts: of anchors that are weighted by a reasoner's word, that one."""
        return self._asking.maker(self.vector.spec.name) if self._weighted else None

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
            self.space.executed_part(made.decided.chunk).unflatten(0, shape),
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
        if isinstance(self.learner, AliasingLearner):
            self.evaluations += updates * len(self.seeds) * self.learner.decoded_rows * self.space.steps
        return self.learner.update(self.replay, updates)

    def acting(self, index: int, decision: int) -> SteeredPolicy:
        """Return the policy that a seed has become."""
        made = self.artefact(index, decision)
        if isinstance(made, AnchorsCritic):
            return steer_anchors(self.space.policy, made)
        return steer_actor(self.space.policy, made)

    def artefact(self, index: int, decision: int) -> SteeringActor | AnchorsCritic:
        """Return a seed's actor, or its critics and anchors."""
        networks = self.learner.networks
        if "actor" in networks:
            size = self.config.size_at(decision) if isinstance(self.config, ResidualConfig) else 1.0
            return actor_of(self.space, networks["actor"].part(index, 1), "squashed", size)
        config, settings, members = self.config, self.settings, self.config.members
        assert isinstance(config, DSRLConfig)
        critics = networks["critic"].part(index * members, members)
        made = AnchorsCritic(
            AnchorsConfig(
                judged=config.judged,
                select=config.select,
                select_temperature=config.select_temperature,
                aggregation=config.aggregation,
                counted=config.subset or members,
                particles=settings.particles,
                spread=settings.spread,
                weighted=self._weighted,
                bound=self.space.bound,
                latent=self.space.latent,
                hidden=critics.hidden,
                norm=critics.norm,
                activation=critics.activation,
            ),
            anchors_of(self.space.policy.action_spec),
            critics.inputs,
            members,
            binding_of(self.space.policy, self.space.steps, self.space.solver),
        )
        made.network.load_state_dict(critics.state_dict())
        return made.to(self.space.device).requires_grad_(False).eval()

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs."""
        found = {"learner": self.learner.state(), "replay": self.replay.state()}
        if self.teachers is not None and self.settings.reteach_every:
            found["teachers"] = self.teachers.state()
        return {f"{part}.{name}": value for part, values in found.items() for name, value in values.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        self.learner.restore(under("learner.", state))
        self.replay.restore(under("replay.", state))
        if self.teachers is not None and self.settings.reteach_every:
            self.teachers.restore(under("teachers.", state))


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
        """Return actions (N, D): what the policy draws, its residual at its present size."""
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

    def acting(self, index: int, decision: int) -> SteeredPolicy:
        """Return the policy that a seed has become."""
        return steer_actor(self.space.policy, self.artefact(index, decision))

    def artefact(self, index: int, decision: int) -> SteeringActor:
        """Return a seed's actor."""
        actor = actor_of(self.space, self.learner.part(index), "gaussian", self.config.size_at(decision))
        actor.log_std.copy_(self.learner.log_std.detach()[index, 0])
        return actor

    def state(self) -> dict[str, Tensor]:
        """Return everything that going on needs, the rollout that is open among it."""
        columns = zip(*self._turns, strict=True)
        turns = {f"turns.{index}": torch.stack(column).cpu() for index, column in enumerate(columns)}
        return turns | {f"learner.{name}": value for name, value in self.learner.state().items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from it."""
        self.learner.restore(under("learner.", state))
        kept = under("turns.", state)
        columns = [kept[str(index)].to(self.learner.device).unbind(0) for index in range(len(kept))]
        self._turns = list(zip(*columns, strict=True))


def decoding(space: SteeringSpace) -> tuple[Decode, int]:
    """Return the frozen flow as noise aliasing asks it, and how many draws of the prior it wants for a latent.

    Raises:
        MismatchError: the policy can't denoise from what a replay keeps.
    """
    spec, latent = space.policy.action_spec, space.latent
    space.context_of(torch.zeros(1, 1))  # a policy that can't is refused before anything is begun
    drawn = latent.kind == "low_rank" and latent.rest == "prior"

    def decode(observations: Tensor, latents: Tensor, rest: Tensor) -> Tensor:
        fresh = rest.unflatten(1, (spec.horizon, spec.dim)) if drawn else latents.new_zeros(1, spec.horizon, spec.dim)
        fresh = functional.pad(fresh.expand(len(latents), -1, -1), (0, spec.padding))
        noise = space.noise(space.split(latents)[0], fresh)
        made = denoise(bind(space.policy, space.context_of(observations)), noise, space.steps, space.solver)
        return space.executed_part(spec.normalise(spec.limit(spec.denormalise(made))))

    return decode, spec.horizon * spec.dim if drawn else 0


def composing(space: SteeringSpace) -> tuple[int, Compose]:
    """Return how many numbers a base's chunk has, and how base and residual become what is executed."""
    spec = space.policy.action_spec
    shape = (spec.horizon, spec.state_dim)

    def compose(base: Tensor, residual: Tensor) -> Tensor:
        made = space.compose(base.unflatten(1, shape), residual.unflatten(1, (space.executed, spec.dim)))
        return spec.normalise(made)[..., : spec.dim].flatten(1)

    return shape[0] * shape[1], compose


def actor_of(
    space: SteeringSpace, network: Any, law: Literal["squashed", "gaussian"], size: float = 1.0
) -> SteeringActor:
    """Return one seed's network as the actor that steers, its residual's bounds times `size`: as far as it has grown."""
    spec = space.policy.action_spec
    given = space.residual_bound
    each = (given,) * spec.dim if isinstance(given, int | float) else given
    bounds = tuple(size * float(one) for one in each)
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
    """A start: coefficients within the bound, in the latent's shape, each by the law of the prior's own numbers.

    Of a Gaussian prior that is what a learner begins with. (Of a uniform one, whose latents nobody learns, low-rank noise has the
    prior's spread, and not its law.)
    """

    space: SteeringSpace

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the noise at t = 0."""
        space, spec = self.space, policy.action_spec
        shape = (context.batch_size, spec.horizon, spec.state_dim)
        fresh = draw_prior(rng, shape, space.device, spec.prior)
        actions = torch.zeros((context.batch_size, space.size), device=space.device)
        own = draw_prior(rng, (context.batch_size, space.latent_size), space.device, spec.prior)
        actions[:, : space.latent_size] = own
        return space.noise(space.split(actions)[0], fresh), fresh.new_zeros(context.batch_size)


def starting_std(config: DSRLConfig | ResidualConfig | RFSConfig) -> float:
    """Return the deviation, in units of the bound and before the squashing, of the residual that a learner begins with."""
    if isinstance(config, RFSConfig):
        return config.residual_std
    return config.initial_std if isinstance(config, ResidualConfig) else 0.0


def starting(space: SteeringSpace, config: DSRLConfig | ResidualConfig | RFSConfig, seed: int) -> SteeredPolicy:
    """Return the policy that a learner begins as: its latents' law, and its random residual.

    Args:
        space: the actions.
        config: settings of the algorithm.
        seed: what the residuals descend from.
    """
    edit = None
    if space.residual_size and not isinstance(config, DSRLConfig):
        first = config.warmup if isinstance(config, ResidualConfig) else 0
        edit = StartingResidual(space, starting_std(config), config.size_at(first), seed)
    return SteeredPolicy(
        space.policy, start=PriorLatent(space) if space.latent_size else None, edit=edit, steps=space.steps
    )


class StartingResidual:
    """An edit: the random residual that a learner begins with, size * bound * tanh(std * N(0, I)).

    Args:
        space: whose units and bounds it has.
        std: its deviation before the squashing.
        size: the share of it that is executed.
        seed: what it descends from.
    """

    candidates = 1

    def __init__(self, space: SteeringSpace, std: float, size: float, seed: int) -> None:
        self._space, self._std, self._size, self._rng = space, std, size, generator(seed)

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:  # noqa: ARG002 - the port's signature
        """Add it to the first candidate."""
        space, spec, base = self._space, self._space.policy.action_spec, chunks[:, 0]
        raw = self._std * torch.randn((len(base), space.residual_size), generator=self._rng)
        residual = self._size * space.limits[space.latent_size :] * torch.tanh(raw)
        chunk = base.clone()
        executed = slice(spec.past, spec.past + space.executed)
        composed = space.compose(base, residual.to(base).unflatten(1, (space.executed, spec.dim)))
        chunk[:, executed] = spec.normalise(composed).to(base)
        return chunk[:, None]
