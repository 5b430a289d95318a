"""What was learned from steering: a small network that says where the flow starts, or (the baseline) what to execute.

A `ChunkRegressor` maps what the frozen policy sees to a chunk. Trained on noises (DSBC, arXiv 2606.13675) it is a noise
policy, and `LearnedNoise` makes it a start; it may have an intention beside it, which says what chunk is meant (`Intention`);
trained on actions (behaviour cloning on the same data) it needs no prior, and
`ExecuteLearned` makes it an edit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from counterflow.binding import Binding
from counterflow.checks import COUNT, POSITIVE, Range, check_names
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.flow import refine
from counterflow.policies import BasePolicy, Normaliser, bind
from counterflow.policies.described import DescribedModule, Format
from counterflow.policies.ensemble import EnsembleMLP
from counterflow.random import draw_normal, draw_prior
from counterflow.steering.context import SteeringContext
from counterflow.steering.latent import LatentShape
from counterflow.steering.start import Rng
from counterflow.steering.steered import Inputs, SteeredPolicy, frozen, inputs_of

Target = Literal["noise", "action"]

LARGEST_INPUT = 10.0  # standard deviations; what is further off than this looks the same to the network


@dataclass(frozen=True)
class Intention:
    """How the chunk that is meant pulls at the noise of a noise policy.

    A flow that hardly listens to its noise in some state needs a very particular noise there, and a regression misses it;
    where it listens, the noise is all that is needed, and keeps near what the prior does. So two ensembles are trained on the
    same examples, one for the noise, w_0 with the frozen flow D, one for the chunk, a with the members' deviation s, and the flow
    starts at the most likely noise given both:

        argmin_w  sum ((D(w) - a) / max(spread s, floor))^2 + penalty ||w - w_0||^2

    by a few steps of Adam through the frozen flow. Where the members disagree, as they do far from the examples, the noise
    policy decides. Ours; not in the papers.

    Attributes:
        spread: by how much the members' deviation understates their error.
        floor: least deviation of the chunk, normalised units of actions.
        penalty: of a squared unit of noise; infinitely much would be the noise policy alone.
        iterations: of Adam, each one denoising and its gradient.
        learning_rate: Adam's, units of the noise.

    Raises:
        InvalidInputError: a number is out of range.
    """

    spread: float = 1.0
    floor: float = 0.1
    penalty: float = 1.0
    iterations: int = 20
    learning_rate: float = 0.15

    def __post_init__(self) -> None:
        """Check every setting."""
        POSITIVE.check_all(self, "spread", "floor", "penalty", "learning_rate")
        COUNT.check_all(self, "iterations")


@dataclass(frozen=True)
class RegressorConfig:
    """A regressor's architecture and what it maps from and to.

    Attributes:
        target: "noise" (a noise policy) or "action" (normalised actions: the behaviour cloning baseline).
        inputs: "features" (the frozen policy's own, see `features_of`) or "observation".
        members: M, networks in the ensemble; their mean is what counts.
        width: neurons of a hidden layer.
        depth: hidden layers.
        bound: outputs are clamped to [-bound, bound], in units of the noise; None: not at all. A commanded gripper's noise
            goes beyond 3, yet bounding it there helps: what lies beyond is where the network extrapolates.
        latent: which part of a noise is learned and said; what isn't is the prior's own, or zero.
        intention: of a noise policy: how a second ensemble, which says what chunk is meant, pulls at the noise; None: there is
            none (DSBC as in the paper).

    Raises:
        UnknownNameError: no such target or kind of input.
        InvalidInputError: a number is out of range.
    """

    target: Target = "noise"
    inputs: Inputs = "features"
    members: int = 5
    width: int = 128
    depth: int = 2
    bound: float | None = 3.0
    latent: LatentShape = field(default_factory=LatentShape)
    intention: Intention | None = None

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if self.intention is not None and (self.target, self.latent.kind) != ("noise", "full"):
            raise InvalidInputError(
                f"an intention was asked for with target {self.target!r} and a {self.latent.kind!r} latent; expected 'noise' and "
                "'full': the noise that is searched is a whole chunk's."
            )
        if self.target == "action" and self.latent.kind != "full":
            raise InvalidInputError(
                f"the latent's shape is {self.latent.kind!r} and the target actions; expected 'full': noises have shapes."
            )
        check_names(self, target=Target, inputs=Inputs)
        COUNT.check_all(self, "members", "width", "depth")
        if self.bound is not None:
            POSITIVE.check("bound", self.bound)

    def of_intention(self) -> RegressorConfig:
        """Return the configuration of the ensemble that says what chunk is meant."""
        return RegressorConfig("action", self.inputs, self.members, self.width, self.depth, bound=None)


class ChunkRegressor(DescribedModule):
    """A small ensemble from what the frozen policy sees to a chunk.

    Args:
        config: architecture, inputs and target.
        input_normaliser: fitted to the inputs (F entries).
        output_normaliser: fitted to the flattened targets (H * A entries, or R * A of a latent shape; padding isn't learned).
        binding: what the targets belong to.

    Attributes:
        intention: the ensemble that says what chunk is meant, where `config.intention` says that there is one; set by who trains
            or loads it.
    """

    intention: ChunkRegressor | None

    FORMAT = Format("counterflow/chunk-regressor", 1, "Noise policies are made by 'counterflow distill'.")
    CALLED = "the network"

    def __init__(
        self, config: RegressorConfig, input_normaliser: Normaliser, output_normaliser: Normaliser, binding: Binding
    ) -> None:
        super().__init__()
        self.intention = None
        rows = config.latent.rows(binding.horizon)
        size = rows * binding.dim
        if output_normaliser.dim != size:
            raise InvalidInputError(
                f"the output normaliser has {output_normaliser.dim} entries; expected {size}, as many as a chunk of "
                f"{rows} x {binding.dim}."
            )
        self.config, self.binding = config, binding
        self.input_normaliser, self.output_normaliser = input_normaliser, output_normaliser
        self.network = EnsembleMLP(input_normaliser.dim, size, config.members, config.width, config.depth)

    def prepare(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (..., F)."""
        return self.input_normaliser.normalise(inputs).clamp(-LARGEST_INPUT, LARGEST_INPUT)

    def members(self, inputs: Tensor) -> Tensor:
        """Return what every member says, (M, B, H, A), for inputs (B, F).

        Raises:
            MismatchError: the inputs have another size.
        """
        if inputs.ndim != 2 or inputs.shape[1] != self.input_normaliser.dim:
            raise MismatchError(
                f"the {self.config.inputs} have shape {tuple(inputs.shape)}; this {self.config.target} policy was made for "
                f"(B, {self.input_normaliser.dim}). Use it with the policy and environment that it was made for."
            )
        prepared = self.prepare(inputs.to(self.device, torch.float32))
        flat = self.output_normaliser.denormalise(self.network(prepared.expand(self.config.members, -1, -1)))
        if self.config.bound is not None:
            flat = flat.clamp(-self.config.bound, self.config.bound)
        rows: Tensor = flat.unflatten(-1, (-1, self.binding.dim))
        return self.config.latent.expand(rows, self.binding.horizon)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the chunk (B, H, A), the members' mean, for inputs (B, F)."""
        return self.members(inputs).mean(0)

    def inputs_of(self, policy: BasePolicy, context: SteeringContext) -> Tensor:
        """Return what this network looks at, (B, F), from a steering context."""
        return inputs_of(policy, context, self.config.inputs)

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values; latent and intention only where they are there, as before."""
        config = asdict(self.config)
        if self.config.latent == LatentShape():
            del config["latent"]
        if self.config.intention is None:
            del config["intention"]
        described = {
            "regressor": config,
            "binding": self.binding.to_json(),
            "input": {"dim": self.input_normaliser.dim, "normalisation": self.input_normaliser.kind},
            "output": {"normalisation": self.output_normaliser.kind},
        }
        return described if self.intention is None else {**described, "intention": self.intention.description()}

    @classmethod
    def from_description(cls, content: dict[str, Any], tensors: dict[str, Tensor]) -> Self:
        """Make what a description tells of."""
        made = cls._of_one(content, tensors, "")
        if made.config.intention is not None:
            made.intention = cls._of_one(content["intention"], tensors, "intention.")
        return made

    @classmethod
    def _of_one(cls, content: dict[str, Any], tensors: dict[str, Tensor], prefix: str) -> Self:
        """Make one ensemble; its tensors' names begin with `prefix`."""
        config = dict(content["regressor"])
        for name, kind in (("latent", LatentShape), ("intention", Intention)):
            if name in config:
                config[name] = kind(**config[name])
        normalisers = [
            Normaliser(
                tensors[f"{prefix}{side}_normaliser.offset"],
                tensors[f"{prefix}{side}_normaliser.scale"],
                content[side]["normalisation"],
            )
            for side in ("input", "output")
        ]
        return cls(RegressorConfig(**config), normalisers[0], normalisers[1], Binding.from_json(content["binding"]))


def binding_of(policy: BasePolicy, steps: int, solver: str = "euler") -> Binding:
    """Return what noises of this policy belong to when they are denoised in `steps` steps."""
    inner, spec = frozen(policy), policy.action_spec
    name = str(getattr(inner, "fingerprint", type(inner).__name__))
    return Binding(name, str(getattr(inner, "family", "")), spec.horizon, spec.dim, steps, solver, spec.padding)


@dataclass(frozen=True)
class LearnedNoise:
    """Where a noise policy says that the flow should start.

    Attributes:
        regressor: trained on noises.
        perturbation: standard deviation of the noise that is added to what it says.

    Raises:
        MismatchError: the network was trained on actions.
        InvalidInputError: the perturbation is out of range.
    """

    regressor: ChunkRegressor
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        """Check target and perturbation."""
        if self.regressor.config.target != "noise":
            raise MismatchError(
                f"this network was trained on {self.regressor.config.target}s; a start needs one that was trained on noises."
            )
        Range(0, 10).check("LearnedNoise perturbation", self.perturbation)

    def __call__(self, policy: BasePolicy, context: SteeringContext, rng: Rng) -> tuple[Tensor, Tensor]:
        """Return the learned noise at t = 0, with the prior's own in the padding."""
        noise = self.regressor(self.regressor.inputs_of(policy, context))
        if self.perturbation:
            noise = noise + self.perturbation * draw_normal(rng, noise.shape, noise.device)
        spec, latent = policy.action_spec, self.regressor.config.latent
        if latent.kind == "low_rank" and latent.rest == "prior":
            rest = draw_prior(rng, noise.shape, noise.device, spec.prior)
            noise = noise + rest - latent.expand(latent.project(rest), spec.horizon)
        if spec.padding:
            fresh = draw_prior(rng, (*noise.shape[:-1], spec.padding), noise.device, spec.prior)
            noise = torch.cat([noise, fresh], dim=-1)
        if self.regressor.intention is not None:
            noise = self._meant(policy, context, noise)
        return noise, noise.new_zeros(context.batch_size)

    def _meant(self, policy: BasePolicy, context: SteeringContext, noise: Tensor) -> Tensor:
        """Return the most likely noise (B, H, A) given what the noise policy and its intention say, see `Intention`."""
        regressor, spec = self.regressor, policy.action_spec
        settings, intention = regressor.config.intention, regressor.intention
        assert settings is not None
        assert intention is not None
        said = intention.members(intention.inputs_of(policy, context))
        deviation = (settings.spread * said.std(0, correction=0)).clamp_min(settings.floor)
        weight = deviation**-2
        weight[:, : spec.past] = 0.0  # what was executed is nobody's to choose
        return refine(
            bind(policy, context.features),
            functional.pad(said.mean(0), (0, spec.padding)),
            regressor.binding.steps,
            noise,
            settings.iterations,
            settings.learning_rate,
            settings.penalty,
            solver=regressor.binding.solver,
            weight=functional.pad(weight, (0, spec.padding)),
            centre=noise,
        )


@dataclass(frozen=True)
class ExecuteLearned:
    """Execute what a network that was trained on actions says, whatever the flow gave (the baseline BC).

    Attributes:
        regressor: trained on actions.
        policy: the policy whose features it looks at.
    """

    regressor: ChunkRegressor
    policy: BasePolicy
    candidates: int = 1

    def __post_init__(self) -> None:
        """Check the target."""
        if self.regressor.config.target != "action":
            raise MismatchError(
                f"this network was trained on {self.regressor.config.target}s; executing needs one trained on actions."
            )

    def __call__(self, chunks: Tensor, context: SteeringContext) -> Tensor:
        """Put the learned chunk in the place of the candidates."""
        chunk: Tensor = self.regressor(self.regressor.inputs_of(self.policy, context))
        return functional.pad(chunk, (0, chunks.shape[-1] - chunk.shape[-1]))[:, None].to(chunks)


def steer_learned(base: BasePolicy, regressor: ChunkRegressor, perturbation: float = 0.0) -> SteeredPolicy:
    """Return `base` driven by what was learned: a noise policy at its start, or an action regressor in its place.

    Raises:
        MismatchError: the network belongs to another frozen policy, action space or way of denoising.
    """
    binding = regressor.binding
    what = f"this {regressor.config.target} policy"
    binding.check(binding_of(base, binding.steps, binding.solver), what)
    if regressor.config.target == "action":
        return SteeredPolicy(base, edit=ExecuteLearned(regressor, base), steps=1)
    start = LearnedNoise(regressor, perturbation)
    return SteeredPolicy(base, start=start, steps=binding.steps, solver=binding.solver)
