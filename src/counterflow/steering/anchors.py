"""Anchors and a critic: flow reversal as the action proposal of reinforcement learning, and no actor at all.

At every decision some references (the anchors: a step along each axis, and "defer") are reversed, noises near each of them are
drawn, an ensemble of critics says what every one is worth, and the best, or their average, is where the flow starts. What
somebody says at that moment, a reasoner for example, may be one more anchor, whose word counts more.

An `AnchorsCritic` holds the critics and the anchors that they were trained with; `steer_anchors` puts it at the policy's start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import COUNT, NOT_NEGATIVE, POSITIVE
from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.flow import denoise
from counterflow.policies import BasePolicy, bind, repeat_context
from counterflow.policies.described import DescribedModule, Format
from counterflow.policies.stacked import Activation, Norm, StackedMLP
from counterflow.random import draw_normal, draw_prior
from counterflow.steering.actor import seen_by_actor
from counterflow.steering.context import Reference, SteeringContext
from counterflow.steering.latent import LatentShape
from counterflow.steering.learned import binding_of
from counterflow.steering.space import SteeringSpace
from counterflow.steering.start import FlowReversal, Rng
from counterflow.steering.steered import SteeredPolicy

Select = Literal["argmax", "sample", "average"]
Judged = Literal["noise", "chunk"]

WORD = 10.0
"""How much more what somebody says counts than an anchor that nobody speaks for."""


class Proposals:
    """Candidates of flow reversal: references, reversed, and noises near them.

    Args:
        space: the latents.
        anchors: N references (N, H, A + padding); one that isn't active is the prior's own noise.
        particles: noises for each reference, the reversed one among them.
        spread: standard deviation of the others around it.
        steps: K of the reversal.

    Raises:
        InvalidInputError: a number is out of range.
        MismatchError: the anchors don't fit the action space.
    """

    def __init__(
        self, space: SteeringSpace, anchors: Reference, particles: int = 8, spread: float = 0.5, steps: int = 5
    ) -> None:
        COUNT.check("particles of an anchor", particles)
        NOT_NEGATIVE.check("the particles' spread", spread)
        anchors.check(space.policy.action_spec, len(anchors.chunk))
        self.space, self.anchors, self.particles, self.spread = space, anchors, particles, spread
        self._start = FlowReversal(steps)
        self.evaluations = 0  # of the field, a row each

    @torch.no_grad()
    def reverse(self, context: object, reference: Reference, rng: Rng, policy: BasePolicy | None = None) -> Tensor:
        """Return the coefficients (B, R A) of the noise that each row's reference reverses to; fresh where nobody speaks.

        Args:
            context: of the observations.
            reference: B of them.
            rng: of what the references don't speak for.
            policy: whose flow; None: the space's.
        """
        policy = self.space.policy if policy is None else policy
        rows, device = len(reference.chunk), self.space.device
        placed = Reference(*(one.to(device) for one in (reference.chunk, reference.active, reference.steered)))
        noise, _ = self._start(policy, SteeringContext(context, rows, placed), rng)
        self.evaluations += rows * self._start.steps
        return self.space.latent.project(noise[..., : policy.action_spec.dim]).flatten(1)

    @torch.no_grad()
    def candidates(
        self, context: object, rows: int, rng: Rng, said: Reference | None = None, policy: BasePolicy | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return candidates (B, N, R A) for every row, and what whoever speaks thinks of them (B, N).

        Args:
            context: of B observations.
            rows: B.
            rng: of particles, and of what the references don't speak for.
            said: B references, one more anchor of each row, which then counts `WORD` times as much as any other.
            policy: whose flow; None: the space's.
        """
        own = [
            one[None].expand(rows, *one.shape)
            for one in (self.anchors.chunk, self.anchors.active, self.anchors.steered)
        ]
        if said is not None:
            own = [
                torch.cat([mine.to(given), given[:, None]], 1)
                for mine, given in zip(own, (said.chunk, said.active, said.steered), strict=True)
            ]
        anchors = own[0].shape[1]
        centres = self.reverse(
            repeat_context(context, anchors), Reference(*(one.flatten(0, 1) for one in own)), rng, policy
        ).unflatten(0, (rows, anchors))
        noise = draw_normal(rng, (rows, anchors, self.particles, centres.shape[-1]))
        noise[:, :, 0] = 0
        limits = self.space.limits[: self.space.latent_size].to(centres)
        found = (centres[:, :, None] + self.spread * noise.to(centres)).clamp(-limits, limits)
        weights = torch.full((rows, anchors, self.particles), 1 / WORD)
        if said is not None:
            weights[:, -1] = 1.0
        return found.flatten(1, 2), weights.flatten(1)


@torch.no_grad()
def executed_of_candidates(
    space: SteeringSpace, context: object, latents: Tensor, fresh: Tensor, policy: BasePolicy | None = None
) -> Tensor:
    """Return what would be executed (B, N, C) of candidates (B, N, D), flat and normalised.

    Args:
        space: the latents.
        context: of B observations.
        latents: (B, N, D) candidates.
        fresh: (B, H, A + padding) the prior's draw with which the chosen one will be used.
        policy: whose flow; None: the space's.
    """
    policy, count = space.policy if policy is None else policy, latents.shape[1]
    spec = space.policy.action_spec
    noise = space.noise(
        space.split(latents.flatten(0, 1).to(space.device))[0], fresh.to(space.device).repeat_interleave(count, 0)
    )
    made = denoise(bind(policy, repeat_context(context, count)), noise, space.steps, space.solver)
    executed: Tensor = space.executed_part(spec.normalise(spec.limit(spec.denormalise(made))))
    return executed.view(*latents.shape[:2], -1)


@torch.no_grad()
def choose(
    latents: Tensor,
    scores: Tensor,
    weights: Tensor | None,
    select: Select,
    temperature: float,
    rngs: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """Return the latent that is used, (S, E, D).

    Args:
        latents: (S, E, N, D) the candidates.
        scores: (S, E, N) what each is worth.
        weights: (S, E, N) how much somebody, a reasoner for example, thinks of each; None: all alike.
        select: the best, by lot, or their average.
        temperature: of the last two, in units of the value.
        rngs: one each of S, for the lot; None: the best in its place.
    """
    preference = scores / temperature
    if weights is not None:
        preference = preference + weights.clamp_min(1e-6).log()
    shares = torch.softmax(preference, -1)
    if select == "average":
        average: Tensor = (shares[..., None] * latents).sum(2)
        return average
    if select == "sample" and rngs is not None:
        drawn = [torch.multinomial(one, 1, generator=rng) for one, rng in zip(shares, rngs, strict=True)]
        best = torch.stack(drawn)[..., 0]
    else:
        best = preference.argmax(-1)
    return latents.gather(2, best[..., None, None].expand(-1, -1, 1, latents.shape[-1]))[:, :, 0]


@dataclass(frozen=True)
class AnchorsConfig:
    """How candidates are made and chosen, and the critics' network.

    Attributes:
        judged: whether critics look at the "noise" or at the "chunk" that it becomes.
        select: how a candidate is chosen by its scores; "sample" is exploration, and takes the best here.
        select_temperature: of "average", and of a reasoner's word, in units of the value.
        aggregation: of the critics' values.
        counted: how many of the critics that is of.
        particles: noises for each anchor.
        spread: their standard deviation.
        weighted: whether what somebody says is one more anchor, and counts more.
        bound: as for `SteeringSpace`.
        latent: as for `SteeringSpace`.
        hidden: neurons of the hidden layers.
        norm: where layer norms stand.
        activation: of the hidden layers.

    Raises:
        UnknownNameError: no such name.
        InvalidInputError: a number is out of range.
    """

    judged: Judged = "noise"
    select: Select = "argmax"
    select_temperature: float = 0.05
    aggregation: Literal["min", "mean"] = "mean"
    counted: int = 1
    particles: int = 8
    spread: float = 0.5
    weighted: bool = False
    bound: float | None = 1.5
    latent: LatentShape = field(default_factory=LatentShape)
    hidden: tuple[int, ...] = (256, 256, 256)
    norm: Norm = "before"
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        """Check names and numbers."""
        for name, known in (
            ("judged", get_args(Judged)),
            ("select", get_args(Select)),
            ("aggregation", ("min", "mean")),
        ):
            if getattr(self, name) not in known:
                raise UnknownNameError(name, str(getattr(self, name)), known)
        POSITIVE.check_all(self, "select_temperature")
        COUNT.check_all(self, "counted")


class AnchorsCritic(DescribedModule):
    """Critics, and the anchors among which they choose.

    Args:
        config: how.
        anchors: N references (N, H, A + padding).
        inputs: I, numbers that a critic sees: what the policy makes of the observation, and a latent or what it becomes.
        members: M, critics.
        binding: the frozen policy and the denoising that they were trained with.

    Raises:
        InvalidInputError: more critics are to count than there are.
    """

    FORMAT = Format("counterflow/anchors", 1, "Anchors are made by 'counterflow train dsrl --variant anchors'.")
    CALLED = "the critics"

    def __init__(self, config: AnchorsConfig, anchors: Reference, inputs: int, members: int, binding: Binding) -> None:
        super().__init__()
        if config.counted > members:
            raise InvalidInputError(
                f"{config.counted} of {members} critics were to count; expected no more than there are."
            )
        self.config, self.binding = config, binding
        self.network = StackedMLP(inputs, 1, members, config.hidden, norm=config.norm, activation=config.activation)
        self.chunks: Tensor
        self.active: Tensor
        self.steered: Tensor
        for name, value in (("chunks", anchors.chunk), ("active", anchors.active), ("steered", anchors.steered)):
            self.register_buffer(name, value.detach().clone())

    @property
    def anchors(self) -> Reference:
        """The N references."""
        return Reference(self.chunks, self.active, self.steered)

    def space(self, policy: BasePolicy) -> SteeringSpace:
        """Return the latents that are chosen."""
        config, binding = self.config, self.binding
        return SteeringSpace(policy, "latent", binding.steps, binding.solver, config.bound, config.latent)

    def scores(self, seen: Tensor, latents: Tensor, executed: Tensor | None, limits: Tensor) -> Tensor:
        """Return what candidates are worth, (B, N).

        Args:
            seen: (B, F) what the policy makes of the observations.
            latents: (B, N, D) the candidates.
            executed: (B, N, C) what they become; only read where that is judged.
            limits: (D,) of the space.

        Raises:
            MismatchError: the inputs have another size.
        """
        looked = latents / limits.to(latents) if self.config.judged == "noise" or executed is None else executed
        wide = torch.cat([seen[:, None].expand(-1, latents.shape[1], -1).to(looked), looked], -1)
        if wide.shape[-1] != self.network.inputs:
            raise MismatchError(
                f"these critics see {self.network.inputs} numbers; they were given {wide.shape[-1]}. Use them with the policy "
                "and the environment that they were trained with."
            )
        flat = wide.flatten(0, 1).to(self.device, torch.float32)
        values = self.network.ensemble(flat[None])[0, : self.config.counted, :, 0]
        found: Tensor = values.amin(0) if self.config.aggregation == "min" else values.mean(0)
        return found.view(latents.shape[:2])

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values."""
        return {
            "anchors": asdict(self.config),
            "sizes": {"inputs": self.network.inputs, "members": self.network.count, "anchors": len(self.chunks)},
            "binding": self.binding.to_json(),
        }

    @classmethod
    def from_description(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make what a description tells of."""
        own = dict(content["anchors"])
        own["latent"], own["hidden"] = LatentShape(**own["latent"]), tuple(own["hidden"])
        sizes, anchors = content["sizes"], Reference(tensors["chunks"], tensors["active"], tensors["steered"])
        binding = Binding.from_json(content["binding"])
        return cls(AnchorsConfig(**own), anchors, sizes["inputs"], sizes["members"], binding)


class AnchorStart:
    """A start: the candidate that the critics think best, with the prior's own noise in all that nobody decides on.

    Args:
        critic: critics and anchors.
        space: what a latent means.
    """

    def __init__(self, critic: AnchorsCritic, space: SteeringSpace) -> None:
        self.critic, self.space = critic, space
        config = critic.config
        self._proposals = Proposals(space, critic.anchors, config.particles, config.spread, space.steps)

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the noise at t = 0."""
        critic, space, spec, rows = self.critic, self.space, policy.action_spec, context.batch_size
        said = context.reference if critic.config.weighted else None
        latents, weights = self._proposals.candidates(context.features, rows, rng, said, policy)
        fresh = draw_prior(rng, (rows, spec.horizon, spec.state_dim), space.device, spec.prior)
        executed = None
        if critic.config.judged == "chunk":
            executed = executed_of_candidates(space, context.features, latents, fresh, policy)
        scores = critic.scores(seen_by_actor(space.policy, context), latents, executed, space.limits)
        opinion = None if said is None else weights[None].to(scores)
        best = choose(
            latents[None].to(scores), scores[None], opinion, critic.config.select, critic.config.select_temperature
        )[0]
        return space.noise(space.split(best.to(space.device))[0], fresh), fresh.new_zeros(rows)


def steer_anchors(base: BasePolicy, critic: AnchorsCritic) -> SteeredPolicy:
    """Return `base`, started where critics think best of what flow reversal proposes.

    Where the critics were trained with somebody's word, a reference that is given is one more anchor.

    Raises:
        MismatchError: the critics belong to another frozen policy or another way of denoising.
    """
    binding = critic.binding
    binding.check(binding_of(base, binding.steps, binding.solver), "this critic of anchors")
    return SteeredPolicy(
        base, start=AnchorStart(critic, critic.space(base)), steps=binding.steps, solver=binding.solver
    )
