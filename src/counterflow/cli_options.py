"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import tyro

from counterflow.errors import InvalidInputError, UnknownNameError

if TYPE_CHECKING:
    from counterflow.experiments.evaluate import Learned
    from counterflow.reasoners.vlm import VLMSettings
    from counterflow.steering import ChunkCritic, GuidanceSettings, MethodSettings

SteerName = Literal["base", "direct", "frs", "partial", "rank"]
LearnedName = Literal["dsbc", "bc", "actor", "anchors"]
GuidedName = Literal["qgf"]


@dataclass(frozen=True)
class Steering:
    """How the frozen policy is steered."""

    steps: int = 10
    """Denoising steps of base, direct, partial and rank."""
    reversal_steps: int = 5
    """K of flow reversal steering, back and forth."""
    perturbation: float = 0.0
    """Noise added to the reversed noise of flow reversal steering (standard deviation)."""
    tau: float = 0.5
    """Noise level of partial noising: near 1 trusts the reference, near 0 the prior."""
    candidates: int = 16
    """n of sample-and-rank."""
    distance: Literal["cosine", "l2"] = "cosine"
    """What sample-and-rank compares by."""
    padding: Literal["fresh", "held", "reversed"] = "fresh"
    """Of flow reversal steering, the padded dimensions of a policy that has some: drawn afresh, held, or kept."""
    latent: Literal["full", "low_rank", "repeated"] = "full"
    """Of flow reversal steering, the shape of the noise that is executed: what a learner of that shape can say."""
    latent_rank: int = 2
    """Of --latent low_rank, how many coefficients over time."""

    def settings(self) -> MethodSettings:
        """Return the methods' settings."""
        from counterflow.steering import MethodSettings

        return MethodSettings(**asdict(self))


@dataclass(frozen=True)
class Guiding:
    """How a critic guides the flow, for --steer qgf, and for any other with --critic."""

    critic: Path | None = None
    """What 'counterflow critic', or offline reinforcement learning, wrote; for --steer qgf the default is critic.safetensors
    beside the policy's own checkpoint."""
    weight: float | Literal["auto", "validate"] = "auto"
    """What the critic's gradient is multiplied with. auto: until guidance moves the prior's chunks by --radius of their own
    spread; validate: the best of several in other episodes."""
    radius: float = 0.5
    """Of --weight auto."""
    best_of: int = 1
    """Candidates, of which the one with the highest value is executed."""
    aggregation: Literal["min", "mean", "lower_confidence"] = "min"
    """What an ensemble's values are together; lower_confidence: mean - rho standard deviations."""
    rho: float = 1.0
    """Of --aggregation lower_confidence."""
    estimate: Literal["clean", "noisy"] = "clean"
    """Where the gradient is taken: at the estimated finished chunk, or at the noisy state."""
    jacobian: bool = False
    """Pull the gradient back through the estimate."""
    schedule: Literal["constant", "remaining"] = "constant"
    """remaining: the weight times (1 - t) / t, made for --jacobian."""
    largest_factor: float = 10.0
    """Of --schedule remaining, what (1 - t) / t is bounded to."""
    clip: bool = True
    """Clip the estimated finished chunk to the action limits."""

    def settings(self) -> GuidanceSettings:
        """Return how the critic guides."""
        from counterflow.steering import GuidanceSettings

        given = asdict(self)
        del given["critic"]
        return GuidanceSettings(**given)

    def load(self, policy: str | None, device: str, *, needed: bool) -> ChunkCritic | None:
        """Return the critic that is named, or, where one is needed, that which lies beside the policy's checkpoint."""
        from counterflow.policies.checkpoint import find
        from counterflow.policies.loading import LEROBOT
        from counterflow.steering import ChunkCritic

        path = self.critic
        if path is None and needed and policy is not None and not policy.startswith(LEROBOT):
            beside_policy = find(policy).with_name("critic.safetensors")
            path = beside_policy if beside_policy.is_file() else None
        if path is not None:
            return ChunkCritic.load(path, device)
        if needed:
            beside = "" if policy is None else f", and no critic.safetensors lies beside the checkpoint of {policy}"
            raise InvalidInputError(
                f"--steer qgf needs a critic; none was given{beside}. Make one with 'counterflow critic', and pass it with "
                "--critic."
            )
        return None


Settings = TypeVar("Settings")
Changes = Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction]
"""NAME=VALUE, several behind one `--set` and as many `--set` as one likes; plain tyro would keep the last alone."""


def changed(config: Settings, settings: Sequence[str]) -> Settings:
    """Return settings (a dataclass) with some of them changed, each given as NAME=VALUE; several numbers as 0.1,0.2.

    Raises:
        InvalidInputError: one is not written so, or its value is not of the setting's kind.
        UnknownNameError: no such setting.
    """
    values: dict[str, Any] = {}
    for one in settings:
        name, equals, text = one.partition("=")
        if not equals:
            raise InvalidInputError(f"a setting was given as {one!r}; expected NAME=VALUE, for example alpha=3.")
        names = [field.name for field in fields(config)]  # type: ignore[arg-type]
        if name not in names:
            raise UnknownNameError("setting", name, names)
        kind = type(getattr(config, name))
        try:
            if kind is bool:
                values[name] = {"true": True, "false": False}[text.lower()]
            elif kind is tuple:
                values[name] = tuple(float(part) for part in text.split(","))
            else:
                values[name] = float(text) if kind is type(None) else kind(text)
        except (ValueError, KeyError):
            expected = "number" if kind is type(None) else kind.__name__
            raise InvalidInputError(f"the setting {name} was given as {text!r}; expected a {expected}.") from None
    return replace(config, **values)  # type: ignore[type-var]


@dataclass(frozen=True)
class Asking:
    """A vision-language model as the reasoner, through any endpoint that speaks OpenAI's API."""

    vlm_model: str | None = None
    """The model's name, as the endpoint knows it."""
    vlm_url: str | None = None
    """The endpoint, for example http://localhost:11434/v1 (Ollama) or http://localhost:8000/v1 (vLLM); default: OpenAI's."""
    vlm_key_variable: str = "OPENAI_API_KEY"
    """The environment's variable that holds the key; it is never written down."""
    vlm_prompt: Path | None = None
    """A prompt of your own; default: src/counterflow/reasoners/prompts/direction.md."""
    vlm_every: int = 1
    """Ask every so many chunks."""
    vlm_asynchronous: bool = False
    """Ask while the last chunk is executed."""
    vlm_timeout: float = 20.0
    """Seconds for an answer, all attempts together."""
    vlm_fallback: Literal["defer", "repeat", "stay"] = "defer"
    """What counts without an answer: the policy alone, what was said last, or standing still."""
    vlm_structure: Literal["schema", "object", "none"] = "schema"
    """How the answer's form is asked for; servers differ in what they know."""
    vlm_most_queries: int | None = None
    """The budget in queries; then the fallback."""
    vlm_most_tokens: int | None = None
    """The budget in tokens; then the fallback."""
    vlm_per_minute: int | None = None
    """Queries a minute at most."""
    vlm_log: Path | None = None
    """Where queries are noted with image, answer, latency and tokens, and answers kept; default: the folder 'vlm' in that of the
    recording or the cockpit's run, and runs/vlm for what has no folder."""

    def folder(self, run: Path | None) -> Path:
        """Return where queries are noted, given the run's folder, if it has one."""
        return self.vlm_log or (Path("runs") if run is None else run) / "vlm"

    def asked(self, *, needed: bool) -> VLMSettings | None:
        """Return whom to ask, and how; None where nobody was named."""
        from counterflow.reasoners.vlm import VLMSettings

        if self.vlm_model is None:
            if needed:
                raise InvalidInputError("--reasoner vlm needs a model; name one with --vlm-model.")
            return None
        return VLMSettings(
            self.vlm_model,
            self.vlm_url,
            self.vlm_key_variable,
            every=self.vlm_every,
            asynchronous=self.vlm_asynchronous,
            timeout=self.vlm_timeout,
            fallback=self.vlm_fallback,
            structure=self.vlm_structure,
            most_queries=self.vlm_most_queries,
            most_tokens=self.vlm_most_tokens,
            per_minute=self.vlm_per_minute,
            prompt=self.vlm_prompt,
        )


def load_learned(steer: str, path: Path | None, device: str) -> Learned | None:
    """Return what --noise-policy names, as --steer wants it; None where nothing is named.

    Raises:
        InvalidInputError: the method has no use for it.
    """
    from counterflow.steering import AnchorsCritic, ChunkRegressor, SteeringActor

    if path is None:
        return None
    if steer not in get_args(LearnedName):
        raise InvalidInputError(f"--noise-policy is of no use to --steer {steer}; did you mean --steer dsbc?")
    kinds: dict[str, type[SteeringActor] | type[AnchorsCritic]] = {"actor": SteeringActor, "anchors": AnchorsCritic}
    return kinds[steer].load(path, device) if steer in kinds else ChunkRegressor.load(path, device)
