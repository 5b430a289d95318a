"""Online reinforcement learning on a frozen flow as a run: DSRL, residual RL and RFS, evaluated on the way, resumable.

    runs/<name>/config.yaml, metrics.jsonl, events.*    as every run
    runs/<name>/checkpoints/state.safetensors           learner, replay, and where every episode was: to go on from
    runs/<name>/seed-<n>/checkpoints/actor.safetensors  what steers: `counterflow.steering.steer_actor`; of the anchors in its
                                                        place anchors.safetensors: `counterflow.steering.steer_anchors`
    runs/<name>/start.json                              what the noise bound cuts off, what latents keep of recorded noises, and
                                                        how the start compares with the base
    runs/<name>/results.json                            learning curves, with intervals over seeds, and the ledger:
                                                        steps, evaluations, queries, seconds
    runs/<name>/figures/learning-curve.png              the curve, once the run is finished

With a recording, every episode of the training is put into a steering dataset as soon as it is over; what a killed run makes
again is there already.

Seeds are trained side by side, each with environments of its own. A simulator's state can't be written down, so a checkpoint
keeps what was executed in the present episodes, and going on executes it again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from counterflow.envs import make_env
from counterflow.errors import InvalidInputError, MismatchError, TrainingError, UnknownNameError
from counterflow.experiments.evaluate import ReasonerSettings, load_prior, policy_name
from counterflow.experiments.online_data import Prefilled, Recording, check_recordable, prefill
from counterflow.experiments.online_loop import Ledger, OnlineLoop, OnlineProgress, OnlineTrained
from counterflow.experiments.online_settings import CONFIGS, Config, OnlineRun
from counterflow.experiments.online_teaching import Teachers, successes_in
from counterflow.experiments.run import Run, read_config
from counterflow.learning.dsrl import DSRLConfig
from counterflow.learning.rfs import RFSConfig
from counterflow.policies import as_device
from counterflow.steering import ChunkRegressor, SteeringSpace, binding_of

__all__ = ["Ledger", "OnlineProgress", "OnlineTrained", "read_online_settings", "train_online"]


def train_online(
    algorithm: str,
    env: str,
    run: Path | str,
    config: Config | None = None,
    settings: OnlineRun | None = None,
    *,
    prefill_from: Path | str | None = None,
    noise_policy: Path | str | None = None,
    record_to: Path | str | None = None,
    policy: str | None = None,
    seeds: Sequence[int] = (0,),
    workers: int | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[OnlineProgress], None] | None = None,
) -> OnlineTrained:
    """Train an online algorithm on one task; called again after an interruption, go on with the same numbers.

    Args:
        algorithm: "dsrl", "residual" or "rfs".
        env: the task.
        run: the run's folder.
        config: settings of the algorithm; None: its defaults.
        settings: of the run.
        prefill_from: a steering dataset, whose episodes the replay begins with (not for RFS).
        noise_policy: what 'counterflow distill' wrote: DSRL's actor begins as its imitation, and goes on imitating it where the
            settings say so (`bc_from="teacher"`). An intention that it has is not imitated.
        record_to: a steering dataset, made or added to, into which the episodes of the training go: latent, base action, executed
            action and intervention mask at every decision, and whether it succeeded. None: they are not kept.
        policy: the frozen policy; None: the shipped prior of the task's family.
        seeds: trained side by side.
        workers: of the simulators, see `make_env`.
        device: where to learn; the frozen policy computes there, too.
        on_progress: called at each report.

    Raises:
        InvalidInputError: settings don't fit the algorithm or one another, or recordings leave no room in the replay.
        MismatchError: policy, algorithm, task, recordings and noise policy don't fit.
        DatasetError: recordings are damaged, or nothing in them serves.
        TrainingError: the folder holds another run; a loss, the flow's chunk, a reward or an observation is not finite any more;
            or a simulator did not come back to where it was left.
        WorkerError: a simulator died; the last checkpoint is safe.
        StorageError: a file can't be written; the last checkpoint is safe.
        UnknownNameError: no such algorithm or environment, or no reasoner for it that could be asked.
    """
    if algorithm not in CONFIGS:
        raise UnknownNameError("online algorithm", algorithm, CONFIGS)
    config = CONFIGS[algorithm]() if config is None else config
    if not isinstance(config, CONFIGS[algorithm]):
        raise InvalidInputError(
            f"{algorithm} was given {type(config).__name__}; expected {CONFIGS[algorithm].__name__}."
        )
    settings = OnlineRun() if settings is None else settings
    _check_sources(algorithm, env, config, settings, prefill_from, noise_policy, record_to)
    device = as_device(device)
    prior = load_prior(env, policy, str(device))
    loose = settings.space(algorithm, prior)
    _check_policy(config, loose)
    config = settings.bounded(config, loose.executed)
    teacher = None if noise_policy is None else _teacher(noise_policy, loose, device)
    data = None if prefill_from is None else _prefilled(algorithm, env, config, settings, prefill_from, loose)
    space = loose if data is None else settings.space(algorithm, prior, data.noises)
    teachers = None
    if teacher is not None:
        known = []
        if settings.reteach_every and prefill_from is not None:
            only, by = settings.successes_only, settings.inversion
            known = successes_in(prefill_from, env, settings.first or None, successes_only=only, inversion=by)
        teachers = Teachers(teacher, space, list(seeds), known)
    if record_to is not None:
        check_recordable(record_to, space)
    content = {
        "algorithm": algorithm,
        "env": env,
        "seeds": list(seeds),
        "policy": policy,
        "policy_fingerprint": policy_name(prior),
        "prefill": None if prefill_from is None else str(prefill_from),
        "noise_policy": None if noise_policy is None else str(noise_policy),
        "record": None if record_to is None else str(record_to),
        "run": _described(settings),
        **asdict(config),
    }
    if teacher is not None:
        content["noise_policy_fingerprint"] = teacher.fingerprint
    # Whatever can be known without simulators is checked before this: once settings lie in the folder, no others are taken.
    with Run(run, content) as folder, ExitStack() as open_ones:
        recording = None
        if record_to is not None:
            about = {
                name: content[name] for name in ("algorithm", "env", "policy_fingerprint", "prefill", "noise_policy")
            }
            about |= {"run": _described(settings), "settings": asdict(config)}
            recording = open_ones.enter_context(Recording(record_to, space, about, list(seeds), settings.num_envs))
        vector = open_ones.enter_context(make_env(env, settings.num_envs * len(seeds), workers=workers))
        loop = OnlineLoop(
            algorithm, vector, space, folder, config, settings, list(seeds), device, data, recording, teachers
        )
        return loop.go(on_progress)


def _prefilled(
    algorithm: str, env: str, config: Config, settings: OnlineRun, source: Path | str, loose: SteeringSpace
) -> Prefilled:
    """Read what the replay begins with, its latents within the bound that its own noises may decide on."""
    options: dict[str, Any] = {"discount": config.discount, "reward": settings.reward, "first": settings.first or None}
    options["successes_only"] = settings.successes_only
    data = prefill(source, loose, env, **options)
    # With less room a batch's share of what was done since would be the same few decisions again and again.
    least = settings.num_envs if isinstance(config, RFSConfig) else max(settings.num_envs, config.batch_size)
    if settings.capacity - len(data.recorded) < least:
        raise InvalidInputError(
            f"a seed's replay has room for capacity = {settings.capacity} decisions, and {len(data.recorded)} of {source} are to "
            f"be prefilled; expected room for {least} more, a batch of what comes. Raise the capacity (--set "
            f"capacity={len(data.recorded) + max(settings.decisions, least)} holds everything), or prefill fewer episodes "
            "(--set first=...)."
        )
    tight = settings.space(algorithm, loose.policy, data.noises)
    return data if tight.bound == loose.bound else prefill(source, tight, env, **options)


def _described(settings: OnlineRun) -> dict[str, Any]:
    """Return a run's settings as its folder keeps them; runs from before there was a choice of inversions can be gone on with."""
    content = asdict(settings)
    if not settings.reteach_every:
        content.pop("inversion")
    return content


def _check_sources(
    algorithm: str,
    env: str,
    config: Config,
    settings: OnlineRun,
    prefill_from: Path | str | None,
    noise_policy: Path | str | None,
    record_to: Path | str | None,
) -> None:
    if settings.keep_steering and algorithm != "dsrl":
        raise InvalidInputError(
            f"keep_steering is for dsrl; {algorithm} was asked for. Use dsrl, or leave keep_steering at false."
        )
    anchors = isinstance(config, DSRLConfig) and config.variant == "anchors"
    if settings.keep_steering or (anchors and settings.reasoner):
        ReasonerSettings(settings.reasoner_error).maker(env)  # where nobody speaks it says so
    if settings.reteach_every and (isinstance(config, RFSConfig) or config.bc_from != "teacher"):
        raise InvalidInputError(
            f"reteach_every is {settings.reteach_every}, and no noise policy is imitated that could be distilled again. "
            "Give dsrl a noise policy and bc_from 'teacher', or leave it at 0."
        )
    if None not in (prefill_from, record_to) and Path(str(prefill_from)).resolve() == Path(str(record_to)).resolve():
        raise InvalidInputError(
            f"{record_to} is to be recorded to, and the replay begins with what it holds: after an interruption that would be "
            "another. Record to a folder of its own."
        )
    if prefill_from is not None and algorithm == "rfs":
        raise InvalidInputError(
            "RFS learns from what it does itself, and has no replay to prefill. Use dsrl or residual, or leave --prefill out."
        )
    if noise_policy is not None and algorithm != "dsrl":
        raise InvalidInputError(f"a noise policy is of no use to {algorithm}; it is what dsrl's actor can begin from.")
    if noise_policy is None:
        if not isinstance(config, RFSConfig) and config.bc_from == "teacher":
            raise InvalidInputError(
                "bc_from is 'teacher', and there is none. Give dsrl a noise policy, or use 'prefilled'."
            )
        return
    assert isinstance(config, DSRLConfig)
    if config.variant == "anchors" or prefill_from is None:
        raise MismatchError(
            "a noise policy was given to begin from, and there is no actor that could imitate it, or no states to do so in. "
            "Use variant sac or aliasing, and prefill with the recordings that it was distilled from."
        )
    if not config.imitation and not (config.bc_from == "teacher" and config.bc_weight):
        raise InvalidInputError(
            "a noise policy was given, and nothing imitates it: expected imitation above 0, or bc_from 'teacher' with a weight."
        )


def _check_policy(config: Config, space: SteeringSpace) -> None:
    """Check that an algorithm can begin as the frozen policy, and ask of it what it wants to."""
    prior = space.policy.action_spec.prior
    if space.latent_size and prior != "gaussian":
        raise MismatchError(
            f"the frozen policy's noise is {prior!r}, and latents that are learned begin as Gaussian ones, which it never saw; "
            "expected 'gaussian'. Learn a residual, which leaves the noise as it is (residual, or rfs with ports 'residual')."
        )
    if isinstance(config, DSRLConfig) and config.variant == "aliasing":
        space.context_of(torch.zeros(1, 1))


def _teacher(path: Path | str, space: SteeringSpace, device: torch.device) -> ChunkRegressor:
    """Load the noise policy that actors imitate, and check that it says noises for what they see."""
    regressor = ChunkRegressor.load(path, device)
    regressor.binding.check(binding_of(space.policy, space.steps, space.solver), "the noise policy to begin from")
    looked = regressor.config.target, regressor.config.inputs
    if looked != ("noise", "features"):
        raise MismatchError(
            f"{path} says a {looked[0]} for the {looked[1]}; expected a noise for the frozen policy's features, which is what an "
            "actor sees. Distil it with the defaults of 'counterflow distill'."
        )
    return regressor


def read_online_settings(folder: Path | str) -> tuple[dict[str, Any], Config, OnlineRun]:
    """Read a run's settings: algorithm, env, seeds, policy, prefill, noise_policy and record; the algorithm's; the run's.

    Raises:
        TrainingError: the folder holds no run of an online algorithm.
    """
    content = read_config(Path(folder) / "config.yaml")
    try:
        names = ("algorithm", "env", "seeds", "policy", "prefill", "noise_policy")
        about = {name: content.pop(name) for name in names} | {"record": content.pop("record", None)}
        content.pop("policy_fingerprint")
        content.pop("noise_policy_fingerprint", None)
        run = content.pop("run")
        run["residual_bound"] = tuple(run["residual_bound"])
        return about, CONFIGS[about["algorithm"]](**content), OnlineRun(**run)
    except (KeyError, TypeError) as error:
        raise TrainingError(f"{folder} holds no complete settings of an online algorithm: {error}.") from error
