"""What reinforcement learning made: a small network that holds the latent, the residual, or both (DSRL, residual RL, RFS).

A `SteeringActor` says the action of a `SteeringSpace` for what the frozen policy sees; `steer_actor` puts it at the policy's
ports: its latent is where the flow starts, its residual is added to the result.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import check_name
from counterflow.errors import MismatchError
from counterflow.policies import BasePolicy
from counterflow.policies.described import DescribedModule, Format
from counterflow.policies.stacked import Activation, Norm, StackedMLP
from counterflow.random import draw_normal, draw_prior
from counterflow.steering.context import SteeringContext
from counterflow.steering.latent import LatentShape
from counterflow.steering.learned import LearnedNoise, binding_of
from counterflow.steering.space import Ports, SteeringSpace
from counterflow.steering.start import Rng
from counterflow.steering.steered import SteeredPolicy, frozen, inputs_of

Law = Literal["squashed", "gaussian"]
LOG_STD = (-5.0, 2.0)
"""Between these a squashed law's log-deviations lie."""
MIDDLE = math.atanh(2 * -LOG_STD[0] / (LOG_STD[1] - LOG_STD[0]) - 1)
"""Where the log-deviation is 0: actors begin there, broad, rather than narrow and far from every label."""


@dataclass(frozen=True)
class ActorConfig:
    """An actor's network, and what its numbers mean.

    Attributes:
        law: "squashed": limit * tanh(a Gaussian of which the network says mean and deviation) (SAC); "gaussian": the latent as it
            is said, clipped where it has a bound, the residual squashed, the deviations the same everywhere (RFS).
        ports, bound, latent, residual_bound, show_base: as for `SteeringSpace`; `residual_bound` one a dimension.
        hidden: neurons of the hidden layers.
        norm: where layer norms stand.
        activation: of the hidden layers.

    Raises:
        UnknownNameError: no such law.
    """

    law: Law = "squashed"
    ports: Ports = "latent"
    bound: float | None = 1.5
    latent: LatentShape = field(default_factory=LatentShape)
    residual_bound: tuple[float, ...] = ()
    show_base: bool = False
    hidden: tuple[int, ...] = (256, 256, 256)
    norm: Norm = "before"
    activation: Activation = "tanh"

    def __post_init__(self) -> None:
        """Check the law."""
        check_name("law of an actor", self.law, Law)

    def space(self, policy: BasePolicy, steps: int, solver: str) -> SteeringSpace:
        """Return the actions that the numbers are."""
        return SteeringSpace(
            policy,
            self.ports,
            steps,
            solver,
            self.bound,
            self.latent,
            self.residual_bound if self.residual_bound else 0.0,
            self.show_base,
        )


class SteeringActor(DescribedModule):
    """One actor.

    Args:
        config: network and meaning.
        inputs: F, numbers that it sees.
        outputs: D, numbers of an action.
        binding: the frozen policy and the denoising that it was trained with.
    """

    FORMAT = Format(
        "counterflow/steering-actor", 1, "Actors are made by 'counterflow train dsrl', 'residual' and 'rfs'."
    )
    CALLED = "the actor"

    def __init__(self, config: ActorConfig, inputs: int, outputs: int, binding: Binding) -> None:
        super().__init__()
        self.config, self.binding = config, binding
        own = 2 * outputs if config.law == "squashed" else outputs  # the deviations of a squashed law are the network's
        self.network = StackedMLP(inputs, own, 1, config.hidden, norm=config.norm, activation=config.activation)
        self.log_std: Tensor
        self.register_buffer("log_std", torch.zeros(outputs))

    @property
    def outputs(self) -> int:
        """D, numbers of an action."""
        return len(self.log_std)

    @property
    def latents(self) -> int:
        """How many of an action's numbers, the first ones, decide on the latent."""
        config = self.config
        return 0 if config.ports == "residual" else config.latent.rows(self.binding.horizon) * self.binding.dim

    def forward(self, inputs: Tensor, limits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return actions (B, D).

        Args:
            inputs: (B, F).
            limits: (D,) of the space.
            noise: (B, D) draws of N(0, I) with which the law is drawn from; None: the means.

        Raises:
            MismatchError: the inputs have another size.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.network.inputs:
            raise MismatchError(
                f"this actor sees (B, {self.network.inputs}); it was given {tuple(inputs.shape)}. Use it with the policy and "
                "the environment that it was trained with."
            )
        said: Tensor = self.network(inputs[None].to(self.device, torch.float32))[0]
        if self.config.law == "squashed":
            mean, log_std = parameters(said)
            raw = mean if noise is None else mean + log_std.exp() * noise.to(said)
            return limits.to(said) * torch.tanh(raw)
        raw = said if noise is None else said + self.log_std.exp() * noise.to(said)
        limits = limits.to(said)
        latent, residual = raw.tensor_split([self.latents], 1)
        largest, bound = limits.tensor_split([self.latents])
        return torch.cat([latent.clamp(-largest, largest), bound * torch.tanh(residual)], 1)

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values."""
        return {
            "actor": asdict(self.config),
            "sizes": {"inputs": self.network.inputs, "outputs": self.outputs},
            "binding": self.binding.to_json(),
        }

    @classmethod
    def from_description(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:  # noqa: ARG003 - sizes are described
        """Make what a description tells of."""
        own = dict(content["actor"])
        own["latent"] = LatentShape(**own["latent"])
        own["hidden"], own["residual_bound"] = tuple(own["hidden"]), tuple(own["residual_bound"])
        sizes = content["sizes"]
        return cls(ActorConfig(**own), sizes["inputs"], sizes["outputs"], Binding.from_json(content["binding"]))


@dataclass(frozen=True, eq=False)
class ActorLatent:
    """A start: the latent that an actor decides on, with the prior's own noise in all that it doesn't.

    Attributes:
        actor: the actor.
        space: what its numbers mean.
        sample: whether the actor's law is drawn from; else its mean is taken.
    """

    actor: SteeringActor
    space: SteeringSpace
    sample: bool = False

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the noise at t = 0."""
        spec = policy.action_spec
        device = self.space.device
        fresh = draw_prior(rng, (context.batch_size, spec.horizon, spec.state_dim), device, spec.prior)
        own = draw_normal(rng, (context.batch_size, self.actor.outputs), device) if self.sample else None
        actions = self.actor(seen_by_actor(policy, context), self.space.limits, own)
        latent, _ = self.space.split(actions.to(device))
        return self.space.noise(latent, fresh), fresh.new_zeros(context.batch_size)


@dataclass(frozen=True, eq=False)
class ActorResidual:
    """An edit: the residual that an actor decides on, its mean, is added to what the flow gave.

    Attributes:
        actor: the actor.
        space: what its numbers mean.
    """

    actor: SteeringActor
    space: SteeringSpace
    candidates: int = 1

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Add the residual to the first candidate."""
        base, spec = chunks[:, 0], self.space.policy.action_spec
        seen = seen_by_actor(self.space.policy, context)
        if self.space.show_base:
            seen = torch.cat([seen, base.flatten(1)], 1)
        _, residual = self.space.split(self.actor(seen, self.space.limits).to(base))
        chunk = base.clone()
        executed = slice(spec.past, spec.past + self.space.executed)
        chunk[:, executed] = spec.normalise(self.space.compose(base, residual)).to(base)
        return chunk[:, None]


def steer_actor(base: BasePolicy, actor: SteeringActor, *, sample: bool | None = None) -> SteeredPolicy:
    """Return `base` driven by an actor.

    Args:
        base: the frozen policy that the actor was trained with (driven by the noise policy that it corrects, if it does).
        actor: the actor.
        sample: whether its latents are drawn (residuals are means); None: a Gaussian law's are (it was trained so, and begins
            as the prior), a squashed law's are not.

    Raises:
        MismatchError: the actor belongs to another frozen policy or another way of denoising, or it corrects a noise policy
            that is not the one in `base`.
    """
    start = base.start if isinstance(base, SteeredPolicy) else None
    driving = start.regressor.fingerprint if isinstance(start, LearnedNoise) else None
    wanted = actor.provenance.get("corrects")
    if wanted is not None and wanted != driving:
        raise MismatchError(
            f"this actor corrects the noise policy {wanted}, and {driving or 'none'} drives here. Give that one: "
            "steer_actor(steer_learned(policy, noise_policy), actor), or --corrects on the command line."
        )
    config, binding = actor.config, actor.binding
    binding.check(binding_of(base, binding.steps, binding.solver), "this actor")
    space = config.space(base, binding.steps, binding.solver)
    drawn = config.law == "gaussian" if sample is None else sample
    latent = ActorLatent(actor, space, drawn) if config.ports != "residual" else None
    edit = ActorResidual(actor, space) if config.ports != "latent" else None
    return SteeredPolicy(base, start=latent, edit=edit, steps=binding.steps, solver=binding.solver)


def parameters(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log-deviation (..., D), before the squashing, of what a squashed law's network says (..., 2 D)."""
    mean, spread = outputs.float().chunk(2, -1)
    low, high = LOG_STD
    return mean, low + 0.5 * (high - low) * (torch.tanh(spread + MIDDLE) + 1)


def seen_by_actor(policy: BasePolicy, context: SteeringContext) -> Tensor:
    """Return what a learner sees of observations, (B, F), as `SteeringSpace.encode` does."""
    kind: Literal["features", "observation"] = "features" if hasattr(frozen(policy), "features") else "observation"
    seen = inputs_of(policy, context, kind)
    return seen.flatten(1).float()
