"""Recording steered rollouts until enough of them have succeeded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import COUNT
from counterflow.data import EpisodeDataset, SteeringDataset, SteeringEpisode
from counterflow.errors import DatasetError, InvalidInputError
from counterflow.experiments.evaluate import (
    ACTOR,
    ANCHORS,
    LEARNED,
    Learned,
    ReasonerSettings,
    asks,
    check_episodes,
    load_prior,
    open_env,
    own_settings,
    steered_by,
)
from counterflow.experiments.inversion import InversionSettings, add_noises, invert_chunks
from counterflow.experiments.rollout import Decision, Episode, run_episodes
from counterflow.experiments.sight import check_on_states, looks
from counterflow.policies import BasePolicy
from counterflow.random import check_seed, child_seed
from counterflow.steering import MethodSettings, SteeringActor, binding_of
from counterflow.steering.steered import check_steps

SMALLEST_WAVE = 8  # episodes; fewer would leave the environments idle


@dataclass(frozen=True)
class Recorded:
    """What a recording left.

    Attributes:
        path: the dataset's folder.
        episodes: how many of this recording are there now.
        successes: how many of them succeeded.
        made: how many were made by this call.
    """

    path: Path
    episodes: int
    successes: int
    made: int


def record(
    env: str,
    method: str,
    out: Path | str,
    *,
    successes: int = 18,
    episodes: int | None = None,
    seed: int = 0,
    settings: MethodSettings | None = None,
    reasoner: ReasonerSettings | None = None,
    policy: str | None = None,
    num_envs: int | None = None,
    max_episodes: int | None = None,
    every_step: bool = True,
    inversion: Literal["regularised", "exact"] = "regularised",
    noise_steps: int | None = None,
    learned: Learned | None = None,
    device: str = "cpu",
    on_episode: Callable[[Episode, int], None] | None = None,
) -> Recorded:
    """Record steered rollouts, failed ones too, until `successes` have succeeded; go on where an earlier call stopped.

    Which episodes are recorded depends on the arguments alone, not on the number of environments or on interruptions. Every
    episode is on disk as soon as it is over. The noise that is kept with each chunk gives that chunk when it is denoised: for
    "frs", "base", "rank", "dsbc", "anchors" and an actor of latents it is the one that was used; for the others, whose chunks did
    not come from a noise at t = 0 or were edited, and for other `noise_steps` than the method's it is found by exact inversion.
    Where a chunk was edited, `base_noise` and `base_chunks` hold where the flow started and what it gave.

    Args:
        env: the task.
        method: "frs", "direct", "partial", "rank" or "base"; with `learned`, "dsbc", "bc", "actor" or "anchors".
        out: the dataset's folder; made, or added to.
        successes: how many successful episodes there should be.
        episodes: record so many episodes instead, whatever comes of them (as a critic wants them).
        seed: what the episodes descend from; others than those of an evaluation with the same seed.
        settings: of the method.
        reasoner: who gives the references.
        policy: the frozen policy; None: the shipped prior of the task's family.
        num_envs: environments stepped side by side.
        max_episodes: after how many episodes to give up; None: ten times as many as successes, and twenty more.
        every_step: also find, for successful episodes, the noise of the actions that were executed from every step on: as
            many more examples as a chunk has actions, for one inversion an episode. Not of a policy that looks through cameras,
            whose pictures are drawn where it decides: a recording keeps its features of them; and not where FRS executes
            its noise in a latent's shape, which an inversion doesn't find.
        inversion: how that noise is found (`InversionSettings`).
        noise_steps: the Euler steps in which the noises that are kept will be denoised; None: the method's own. For others every
            noise is found by inversion: FRS may want more steps than what learns from it can pay for at every decision.
        learned: the noise policy of "dsbc", the action policy of "bc", the actor of "actor", or critics and anchors.
        device: where the policy computes.
        on_episode: called with each finished episode and the number of successes so far.

    Raises:
        InvalidInputError: a number is out of range.
        MismatchError: the folder holds noises of another policy, policy and task don't fit, or noises would have to be found at
            pictures, which aren't kept.
        DatasetError: too few episodes succeed; what was recorded is safe.
        StorageError: an episode can't be written; those before are safe.
    """
    COUNT.check("successes", successes)
    if episodes is not None:
        check_episodes(episodes)
    most = 10 * successes + 20 if max_episodes is None else max_episodes
    if most < successes:
        raise InvalidInputError(f"max_episodes is {most}; expected at least as many as successes, {successes}.")
    settings = MethodSettings() if settings is None else settings
    reasoner = ReasonerSettings() if reasoner is None else reasoner
    prior = load_prior(env, policy, device)
    if learned is not None and method not in (ACTOR, ANCHORS, *LEARNED):
        raise InvalidInputError(
            f"{method!r} was given something that was learned; expected 'dsbc', 'bc', 'actor' or 'anchors' with it."
        )
    steered = steered_by(prior, method, settings, learned)
    has_noise = method in ("frs", "base", "rank") or (learned is not None and not steered.edits)
    # An actor's chunks come of the flow that it was trained with, edited or not.
    own_steps = steered.steps if has_noise or method == ACTOR else settings.steps
    binding = binding_of(prior, own_steps, steered.solver)
    if noise_steps is not None:
        check_steps(noise_steps)
        binding = binding_of(prior, noise_steps)
        has_noise = has_noise and (binding.steps, binding.solver) == (own_steps, steered.solver)
    if not has_noise:
        hint = "Record with 'frs', 'base', 'rank' or 'dsbc', and their own steps."
        check_on_states(prior, f"the noise of the chunks of {method!r} is found by inversion", hint)
    shaped = method == "frs" and settings.latent != "full"
    if shaped and not has_noise:
        raise InvalidInputError(
            f"noises of latent {settings.latent!r} were asked for in {noise_steps} steps, where the method has {own_steps}: they "
            "would be found by inversion, which knows no shape; expected the method's own steps. Leave noise_steps out."
        )
    every_step = every_step and not looks(prior) and not shaped
    asked = asks(method, learned)
    of_steps = InversionSettings.of(inversion, binding.steps)
    provenance = {
        "recording": "steered rollouts",
        "env": env,
        "method": method,
        "settings": own_settings(method, settings),
        "reasoner": reasoner.to_json() if asked else None,
        "every_step": asdict(of_steps) if every_step else None,
        "seed": check_seed(seed),
        "policy": binding.policy,
    }
    if learned is not None:
        provenance |= {"learned": learned.fingerprint}
    if isinstance(learned, SteeringActor) and steered.edits:
        provenance |= {"ports": learned.config.ports}
    if noise_steps is not None:  # noted only there, so that recordings made before go on
        provenance |= {"noise_steps": noise_steps}
    spec = prior.action_spec
    if spec.past or spec.executed is not None:  # noted only there, so that recordings made before go on
        provenance |= {"past": spec.past, "executed": spec.executed}
    with SteeringDataset.create_or_open(out, binding) as dataset:
        source = dataset.add_source(provenance)
        already = {episode.index: episode.success for episode in dataset.episodes if episode.source == source}
        made, tried = 0, 0
        outcomes: dict[int, bool] = {}
        vector = None
        try:
            while sum(outcomes.values()) < successes if episodes is None else tried < episodes:
                if episodes is None and tried >= most:
                    raise DatasetError(
                        f"after {tried} episodes of {env} only {sum(outcomes.values())} succeeded; {successes} were asked for. "
                        f"What was recorded is safe in {out}. Ask for fewer, steer better, or raise max_episodes."
                    )
                # How many come next depends on what came of those before, and on nothing else.
                ahead = tried + max(SMALLEST_WAVE, successes - sum(outcomes.values()))
                wave = range(tried, min(most, ahead) if episodes is None else episodes)
                tried = wave.stop
                outcomes.update({index: already[index] for index in wave if index in already})
                missing = {child_seed(seed, "recording", index): index for index in wave if index not in already}
                if not missing:
                    continue

                def keep(episode: Episode, missing: dict[int, int] = missing) -> None:
                    nonlocal made
                    index = missing[episode.seed]
                    # What a chosen or replaced chunk was chosen over is nobody's base.
                    arrays = arrays_of(episode.decisions, bases=method == ACTOR and steered.edits)
                    if not has_noise:
                        arrays |= inverted(prior, arrays, binding)
                    if every_step and episode.success:  # nobody learns from the others
                        arrays |= step_noises(prior, arrays, of_steps)
                    dataset.append(SteeringEpisode(env, episode.seed, index, episode.success, source, arrays))
                    outcomes[index] = episode.success
                    made += 1
                    if on_episode is not None:
                        on_episode(episode, sum(outcomes.values()))
                    episode.decisions.clear()

                drawn: dict[str, Any] = {"render": reasoner.render} if asked and reasoner.render is not None else {}
                vector = (
                    open_env(env, max(episodes or successes, SMALLEST_WAVE), num_envs=num_envs, **drawn)
                    if vector is None
                    else vector
                )
                run_episodes(
                    steered,
                    vector,
                    list(missing),
                    reasoner.maker(env) if asked else None,
                    convention=reasoner.writing(),
                    record=True,
                    on_episode=keep,
                )
        finally:
            if vector is not None:
                vector.close()
    return Recorded(Path(out), len(outcomes), sum(outcomes.values()), made)


def arrays_of(decisions: Sequence[Decision], *, bases: bool = False) -> dict[str, npt.NDArray[Any]]:
    """Return an episode's decisions as the arrays of a steering dataset.

    Args:
        decisions: of one episode.
        bases: also what the policy's own flow gave, which a residual was added to or somebody corrected.
    """
    arrays: dict[str, npt.NDArray[Any]] = {
        "observations": np.stack([one.observation for one in decisions]),
        "references": np.stack([one.reference for one in decisions]),
        "active": np.array([one.active for one in decisions]),
        "steered": np.stack([one.steered for one in decisions]),
        "noise": np.stack([one.noise for one in decisions]),
        "start_time": np.array([one.start_time for one in decisions], np.float32),
        "chunks": np.stack([one.chunk for one in decisions]),
        "executed": np.array([len(one.step_actions) for one in decisions], np.int64),
        "intervened": np.array([one.intervened for one in decisions]),
        "step_observations": np.concatenate([one.step_observations for one in decisions]),
        "step_actions": np.concatenate([one.step_actions for one in decisions]),
        "rewards": np.concatenate([one.rewards for one in decisions]),
    }
    for name, values in (
        ("base_noise", [one.base_noise for one in decisions if one.base_noise is not None]),
        ("base_chunks", [one.base_chunk for one in decisions if one.base_chunk is not None]),
    ):
        if bases and len(values) == len(decisions):
            arrays[name] = np.stack(values)
    features = [one.features for one in decisions if one.features is not None]
    if len(features) == len(decisions):
        arrays["features"] = np.stack(features)
    return arrays


def step_noises(
    policy: BasePolicy, arrays: dict[str, npt.NDArray[Any]], settings: InversionSettings
) -> dict[str, npt.NDArray[Any]]:
    """Return the noise of the actions that were executed from each of an episode's T steps on.

    Returns:
        `step_noise` (T, H, A), `step_noise_valid` (T,) (False near the end, where fewer than H actions follow, and where no
        noise gives them), `step_chunks` (T, H, A) normalised, and `step_features` (T, F) where the policy offers features.
    """
    observations, actions = arrays["step_observations"], arrays["step_actions"]
    steps, spec = len(actions), policy.action_spec
    found = {
        "step_noise": np.zeros((steps, spec.horizon, spec.state_dim), np.float32),
        "step_noise_valid": np.zeros(steps, bool),
        "step_chunks": np.zeros((steps, spec.horizon, spec.state_dim), np.float32),
    }
    if steps >= spec.horizon:
        noises, _ = add_noises(one_episode(observations, actions), policy, settings)
        windows = np.lib.stride_tricks.sliding_window_view(noises["normalised_actions"], spec.horizon, axis=0)
        found["step_chunks"][spec.past : spec.past + len(windows)] = windows.transpose(0, 2, 1)
        found |= {"step_noise": noises["noise"], "step_noise_valid": noises["noise_valid"]}
        if "features" in noises:
            found["step_features"] = noises["features"]
    elif hasattr(policy, "features"):
        with torch.no_grad():
            features: Tensor = policy.features(policy.encode(torch.from_numpy(observations)))
        found["step_features"] = features.float().cpu().numpy()
    return found


def one_episode(observations: npt.NDArray[Any], actions: npt.NDArray[Any]) -> EpisodeDataset:
    """Return a dataset of a single episode of observations (T, ...) and actions (T, A)."""
    arrays = {"observations": observations, "actions": actions}
    return EpisodeDataset(arrays, np.zeros(1, np.int64), np.array([len(actions)], np.int64))


def inverted(policy: BasePolicy, arrays: dict[str, npt.NDArray[Any]], binding: Binding) -> dict[str, npt.NDArray[Any]]:
    """Return the noise that gives an episode's chunks, by exact inversion, in the place of where the flow started."""
    noise, _ = invert_chunks(
        policy,
        torch.from_numpy(arrays["observations"]),
        torch.from_numpy(arrays["chunks"]),
        InversionSettings(steps=binding.steps),
    )
    return {"noise": noise.cpu().numpy(), "start_time": np.zeros_like(arrays["start_time"])}
