"""DAgger in noise space, end to end: roll out, let the expert take over, invert, learn on, again; everything in one folder.

`FOLDER/rollouts/` is a steering dataset of every episode (whose decisions say who made them), `FOLDER/round-<n>.safetensors` the
noise policy after n rounds, `FOLDER/rounds.json` what came of each. An interrupted run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from counterflow.checks import COUNT
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import Batch, VectorEnv
from counterflow.errors import DatasetError, MismatchError, TrainingError
from counterflow.experiments.distill import examples_of
from counterflow.experiments.evaluate import check_episodes, load_prior, open_env
from counterflow.experiments.inversion import InversionSettings, invert_chunks
from counterflow.experiments.record import arrays_of, step_noises
from counterflow.experiments.rollout import Decision, Episode, decision_of
from counterflow.experiments.sight import check_on_states
from counterflow.files import write_json
from counterflow.learning import NoiseExamples
from counterflow.learning.dagger import DAggerConfig, InterventionRule, Situation, Stalled, learn
from counterflow.policies import ActionSpec, BasePolicy
from counterflow.random import RowGenerators, check_seed, child_seed
from counterflow.reasoners import Expert, oracle_expert
from counterflow.reasoners.progress import remaining
from counterflow.steering import ChunkRegressor, LatentShape, RegressorConfig, SteeredPolicy, steer_learned

MakeRule = Callable[[], InterventionRule]
MakeExpert = Callable[[], Expert]


@dataclass(frozen=True)
class Round:
    """What came of one round.

    Attributes:
        number: 0 for the noise policy that DAgger began with.
        episodes: how many were played with the expert at hand.
        successes: how many of them succeeded, with whatever help.
        unaided: how many succeeded without any.
        interventions: share of all decisions that the expert made.
        corrections: examples that the expert's decisions gave.
    """

    number: int
    episodes: int
    successes: int
    unaided: int
    interventions: float
    corrections: int


def dagger(
    env: str,
    data: Path | str,
    out: Path | str,
    *,
    rounds: int = 4,
    episodes: int = 10,
    first: int | None = None,
    seed: int = 0,
    config: DAggerConfig | None = None,
    make_rule: MakeRule = Stalled,
    make_expert: MakeExpert | None = None,
    policy: str | None = None,
    num_envs: int | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> list[Round]:
    """Improve a noise policy by an expert's interventions.

    Args:
        env: the task.
        data: what the first noise policy is distilled from: a steering dataset, or an inverted archive.
        out: the run's folder.
        rounds: how many times to roll out and learn.
        episodes: rollouts a round.
        first: use the first so many successful episodes of `data`.
        seed: what everything descends from.
        config: settings of the learning.
        make_rule: makes the rule of an environment, which decides who acts.
        make_expert: makes the expert of an environment; None: OGBench's oracle for the task.
        policy: the frozen policy; None: the shipped prior of the task's family.
        num_envs: environments stepped side by side; what is recorded does not depend on it.
        on_round: called after each round.

    Returns:
        What came of each round, those of earlier calls, too.

    Raises:
        InvalidInputError: a number is out of range.
        MismatchError: policy, task and data don't fit.
        TrainingError: the folder holds a run with other settings.
        DatasetError: the data can't be learned from.
        StorageError: something can't be written; finished rounds are safe.
    """
    COUNT.check("rounds", rounds)
    check_episodes(episodes)
    config, out = DAggerConfig() if config is None else config, Path(out)
    prior = load_prior(env, policy)
    check_on_states(prior, "the noise of an expert's actions is found", "Distil steered rollouts instead.")
    if prior.action_spec.past:
        raise MismatchError(
            f"the policy plans {prior.action_spec.past} actions that are over when it decides, so an expert's chunk is none of "
            "its own. Use a policy that sees one observation at a time, or distil demonstrations instead."
        )
    beginning = examples_of(data, config.distillation, env=None, first=first)
    settings = _plain(
        {
            "env": env,
            "data": str(data),
            "first": first,
            "episodes": episodes,
            "seed": check_seed(seed),
            "config": _settings_of(config),
            "rule": _name_of(make_rule()),
        }
    )
    done = _rounds_so_far(out, settings)
    write_json(out / "rounds.json", {"settings": settings, "rounds": [asdict(one) for one in done]})
    path = out / "round-0.safetensors"
    if not path.exists():
        learn(beginning, [], config, seed=seed).save(path)
    expert = (lambda: oracle_expert(env)) if make_expert is None else make_expert
    vector = None
    try:
        with SteeringDataset.create_or_open(out / "rollouts", beginning.binding) as dataset:
            for number in range(len(done), rounds):
                regressor = ChunkRegressor.load(out / f"round-{number}.safetensors")
                source = dataset.add_source({"recording": "dagger", "round": number, **settings})
                seeds = [child_seed(seed, "round", number, index) for index in range(episodes)]
                missing = {one: index for index, one in enumerate(seeds) if not dataset.has(source, env, index)}
                if missing:
                    vector = open_env(env, episodes, num_envs=num_envs) if vector is None else vector
                    played = run_with_expert(
                        steer_learned(prior, regressor), vector, list(missing), regressor, make_rule, expert
                    )
                    for episode in played:
                        arrays = _corrected(prior, arrays_of(episode.decisions, bases=True), beginning.binding.steps)
                        index = missing[episode.seed]
                        dataset.append(SteeringEpisode(env, episode.seed, index, episode.success, source, arrays))
                recorded = [one for one in dataset.episodes if one.source == source]
                corrections = corrections_of(dataset, config.distillation.regressor)
                learned = learn(beginning, corrections, config, seed=seed, initial=regressor)
                learned.provenance |= {"algorithm": "dagger", "round": number + 1, "settings": settings}
                learned.save(out / f"round-{number + 1}.safetensors")
                done.append(_summary(number, recorded, corrections_of_episodes(recorded)))
                write_json(out / "rounds.json", {"settings": settings, "rounds": [asdict(one) for one in done]})
                if on_round is not None:
                    on_round(done[-1])
    finally:
        if vector is not None:
            vector.close()
    return done


def run_with_expert(
    policy: SteeredPolicy,
    env: VectorEnv,
    seeds: Sequence[int],
    regressor: ChunkRegressor,
    make_rule: MakeRule,
    make_expert: MakeExpert,
) -> list[Episode]:
    """Run one episode a seed with an expert at hand; return them, recorded, in the order of the seeds.

    Args:
        policy: driven by the noise policy.
        env: where to run.
        seeds: one an episode.
        regressor: the noise policy, whose members' disagreement rules may look at.
        make_rule: makes the rule of a row.
        make_expert: makes the expert of a row.
    """
    spec = policy.action_spec
    rows = env.num_envs
    waiting, playing = list(range(len(seeds)))[::-1], dict[int, int]()
    episodes = [Episode(seed) for seed in seeds]
    rules, experts = [make_rule() for _ in range(rows)], [make_expert() for _ in range(rows)]
    noise, expert_acts, since = RowGenerators([0] * rows), [False] * rows, [0] * rows

    def begin(row: int) -> int:
        index = waiting.pop()
        playing[row] = index
        noise.reseed(row, child_seed(seeds[index], "policy"))
        rules[row].reset()
        expert_acts[row], since[row] = False, 0
        return child_seed(seeds[index], "environment")

    fresh = {row: begin(row) for row in range(min(rows, len(seeds)))}
    batch = env.reset({row: fresh.get(row, 0) for row in range(rows)})
    while playing:
        before = batch.observation
        # Computed for all rows, so that the batch keeps its shape and a row's noise never depends on who acts in others.
        plan = policy.act(torch.from_numpy(before), None, noise)
        features = None if plan.features is None else plan.features.float().cpu().numpy()
        disagreement = _disagreement(regressor, before, features)
        for row in playing:
            situation = Situation(remaining(batch.view(row)), disagreement[row], since[row], expert_acts[row])
            acts = rules[row].expert_should_act(situation)
            if acts != expert_acts[row]:
                expert_acts[row], since[row] = acts, 0
                if acts:
                    episode = episodes[playing[row]]
                    experts[row].reset(child_seed(episode.seed, "expert", episode.chunks))
            since[row] += 1
        theirs = [row for row in sorted(playing) if expert_acts[row]]
        ours = [row for row in sorted(playing) if not expert_acts[row]]
        made: dict[int, tuple[Decision, bool, bool]] = {}  # decision, success, done
        if theirs:
            for row, decision, success, over in _expert_chunks(env, batch, theirs, experts, spec, features):
                made[row] = decision, success, over
        if ours:
            after = env.execute(plan.actions[:, : spec.executed].cpu().numpy(), rows=ours)
            for row in ours:
                decision = decision_of(plan, after, row, before[row])
                made[row] = decision, bool(after.success[row]), bool(after.done[row])
        fresh = {}
        for row, (decision, success, over) in sorted(made.items()):
            episode = episodes[playing[row]]
            own = plan.noise[row].float().cpu().numpy(), plan.base_chunk[row].float().cpu().numpy()
            decision = replace(decision, base_noise=own[0], base_chunk=own[1])  # what corrections correct
            episode.decisions.append(decision)
            episode.chunks += 1
            episode.steps += len(decision.step_actions)
            episode.rewards += float(decision.rewards.sum())
            episode.success = episode.success or success
            if over:
                del playing[row]
                if waiting:
                    fresh[row] = begin(row)
        # Without new episodes too: the present state of all rows, whoever stepped them last.
        batch = env.reset(fresh) if fresh else env.present()
    return episodes


def corrections_of(dataset: SteeringDataset, config: RegressorConfig) -> list[NoiseExamples]:
    """Return what the expert's decisions teach: the noise of its actions from every step on, where all H were its own."""
    found = []
    name = "step_features" if config.inputs == "features" else "step_observations"
    shown, targets, meant, episodes = [], [], [], []
    for number, episode in enumerate(dataset.episodes):
        usable = usable_corrections(episode)
        if usable.any():
            shown.append(episode.arrays[name][usable].reshape(int(usable.sum()), -1))
            targets.append(episode.arrays["step_noise"][usable][..., : dataset.binding.dim])
            if config.intention is not None:
                meant.append(episode.arrays["step_chunks"][usable][..., : dataset.binding.dim])
            episodes.append(np.full(int(usable.sum()), number, np.int64))
    if shown:
        found.append(
            NoiseExamples(
                np.concatenate(shown),
                np.concatenate(targets),
                np.concatenate(episodes),
                dataset.binding,
                np.concatenate(meant) if meant else None,
            )
        )
    return found


def corrections_of_episodes(episodes: Sequence[SteeringEpisode]) -> int:
    """Return how many examples the expert's decisions in these episodes give."""
    return sum(int(usable_corrections(episode).sum()) for episode in episodes)


def usable_corrections(episode: SteeringEpisode) -> npt.NDArray[np.bool_]:
    """Say from which steps (T,) on a whole chunk was the expert's, and has a noise."""
    expert: npt.NDArray[np.bool_] = episode.arrays["step_intervened"]
    horizon = episode.arrays["step_noise"].shape[1]
    whole = np.zeros(len(expert), bool)
    if len(expert) >= horizon:
        windows = np.all(np.lib.stride_tricks.sliding_window_view(expert, horizon), axis=1)
        whole[: len(windows)] = windows
    usable: npt.NDArray[np.bool_] = np.logical_and(whole, episode.arrays["step_noise_valid"])
    return usable


def _expert_chunks(
    env: VectorEnv,
    batch: Batch,
    rows: Sequence[int],
    experts: Sequence[Expert],
    spec: ActionSpec,
    features: npt.NDArray[np.float32] | None,
) -> list[tuple[int, Decision, bool, bool]]:
    """Let experts act for a chunk's length, one action at a time; return row, decision, success and whether it is over."""
    seen: dict[int, list[npt.NDArray[np.float32]]] = {row: [] for row in rows}
    acted: dict[int, list[npt.NDArray[np.float32]]] = {row: [] for row in rows}
    rewards: dict[int, list[float]] = {row: [] for row in rows}
    success, over = dict.fromkeys(rows, False), dict.fromkeys(rows, False)
    actions = np.zeros((env.num_envs, 1, spec.dim), np.float32)
    for _ in range(spec.executed or spec.horizon):
        alive = [row for row in rows if not over[row]]
        if not alive:
            break
        for row in alive:
            actions[row, 0] = experts[row].act(batch.view(row))
            seen[row].append(batch.observation[row])
            acted[row].append(actions[row, 0].copy())
        batch = env.execute(actions, rows=alive)
        for row in alive:
            rewards[row].append(float(batch.rewards[row, 0]))
            success[row] = success[row] or bool(batch.success[row])
            over[row] = bool(batch.done[row])
    made = []
    for row in rows:
        executed = np.stack(acted[row])
        # An episode that ended inside the chunk: what was not executed repeats the last action, and is never learned from.
        whole = np.concatenate([executed, np.repeat(executed[-1:], spec.horizon - len(executed), axis=0)])
        chunk = spec.normalise(torch.from_numpy(whole)).numpy()
        nothing = np.zeros_like(chunk)
        made.append(
            (
                row,
                Decision(
                    observation=seen[row][0],
                    features=None if features is None else features[row],
                    reference=nothing,
                    active=False,
                    steered=np.zeros(chunk.shape, bool),
                    noise=nothing,  # found by inversion when the episode is over
                    start_time=0.0,
                    chunk=chunk,
                    intervened=True,
                    step_observations=np.stack(seen[row]),
                    step_actions=executed,
                    rewards=np.asarray(rewards[row], np.float32),
                ),
                success[row],
                over[row],
            )
        )
    return made


def _corrected(prior: BasePolicy, arrays: dict[str, npt.NDArray[Any]], steps: int) -> dict[str, npt.NDArray[Any]]:
    """Return an episode's arrays with the noises of all steps, and the exact ones of the expert's decisions in their place."""
    arrays = arrays | step_noises(prior, arrays, InversionSettings.of("regularised", steps))
    arrays["step_intervened"] = np.repeat(arrays["intervened"], arrays["executed"])
    experts = np.flatnonzero(arrays["intervened"])
    if len(experts) == 0:
        return arrays
    first_steps = (np.cumsum(arrays["executed"]) - arrays["executed"])[experts]
    observations = torch.from_numpy(arrays["observations"][experts])
    chunks = torch.from_numpy(arrays["step_chunks"][first_steps])  # what was executed from there on
    exact = InversionSettings(steps)
    found, missed = (one.cpu().numpy() for one in invert_chunks(prior, observations, chunks, exact))
    # What no noise gives, or what the episode's end cut off, must not be learned from: no noise lies at t = 1.
    known = np.isfinite(found).all((1, 2)) & (missed <= exact.tolerance)
    usable = known & (first_steps + prior.action_spec.horizon <= len(arrays["step_chunks"]))
    noise, start_time = arrays["noise"].copy(), arrays["start_time"].copy()
    noise[experts] = np.where(known[:, None, None], found, 0.0)
    start_time[experts[~usable]] = 1.0
    return arrays | {"noise": noise, "start_time": start_time}


def _disagreement(
    regressor: ChunkRegressor, observations: npt.NDArray[np.float32], features: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float64]:
    """Return the standard deviation between the members, mean over the chunk, (N,)."""
    shown = features if regressor.config.inputs == "features" and features is not None else observations
    with torch.no_grad():
        members = regressor.members(torch.from_numpy(shown))
    spread: npt.NDArray[np.float64] = members.std(0, correction=0).mean((1, 2)).double().cpu().numpy()
    return spread


def _settings_of(config: DAggerConfig) -> dict[str, Any]:
    """Return settings as plain values; the latent's shape only where it isn't full, so that earlier runs go on."""
    content = asdict(config)
    if config.distillation.regressor.latent == LatentShape():
        del content["distillation"]["regressor"]["latent"]
    return content


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings as json reads them back, so that they compare equal to those of an earlier call."""
    plain: dict[str, Any] = json.loads(json.dumps(settings))
    return plain


def _name_of(rule: InterventionRule) -> str:
    """Return a name that stays the same from call to call: a rule's settings, or its class where it does not tell them."""
    tells = type(rule).__repr__ is not object.__repr__
    return repr(rule) if tells else f"{type(rule).__module__}.{type(rule).__qualname__}"


def _summary(number: int, episodes: Sequence[SteeringEpisode], corrections: int) -> Round:
    helped = [bool(episode.arrays["intervened"].any()) for episode in episodes]
    decisions = np.concatenate([episode.arrays["intervened"] for episode in episodes])
    return Round(
        number=number,
        episodes=len(episodes),
        successes=sum(episode.success for episode in episodes),
        unaided=sum(episode.success and not help for episode, help in zip(episodes, helped, strict=True)),
        interventions=float(decisions.mean()),
        corrections=corrections,
    )


def _rounds_so_far(out: Path, settings: dict[str, Any]) -> list[Round]:
    """Read what earlier calls did.

    Raises:
        TrainingError: they had other settings.
        DatasetError: the file is damaged.
    """
    path = out / "rounds.json"
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        found, rounds = content["settings"], [Round(**one) for one in content["rounds"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(f"{path} can't be read: {error}. Choose another folder.") from error
    if found != settings:
        changed = sorted(name for name in settings if found.get(name) != settings[name])
        raise TrainingError(
            f"{out} holds a run with other settings ({', '.join(changed)}). Use the same ones to go on with it, or choose "
            "another folder."
        )
    return rounds
