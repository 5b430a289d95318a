"""Rolling out a steered policy in many environments at once.

Episodes are spread over the rows of a vector environment; a row that finishes takes the next episode. What happens in an
episode depends on its seed: the environment's start, the policy's noise and the reasoner's mistakes all descend from it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.checks import COUNT
from counterflow.envs import Batch, VectorEnv
from counterflow.envs.types import Image
from counterflow.errors import InvalidInputError
from counterflow.experiments.sight import Eyes
from counterflow.random import RowGenerators, child_seed
from counterflow.reasoners import OGBENCH, Convention, Direction, Reasoner, View, to_reference
from counterflow.steering import Plan, SteeredPolicy

MakeReasoner = Callable[[], Reasoner]


@dataclass(frozen=True)
class Decision:
    """One decision of a recorded episode, and what came of it.

    Attributes:
        observation: (O,) the environment's state, which is what a policy on states saw.
        features: (F,) what it made of that, where it offers features; else None.
        reference: (H, A) the reference, normalised; zero where nobody spoke.
        active: whether somebody spoke.
        steered: (H, A) bool, the entries that the reference speaks for.
        noise: (H, A) where the flow started.
        start_time: the time at which it started.
        chunk: (H, A) normalised, what was to be executed.
        intervened: whether an expert acted, and not the policy.
        step_observations: (T, O) before each of the T executed actions.
        step_actions: (T, A) the executed actions, environment units.
        rewards: (T,).
        base_noise: (H, A) where the policy's own flow started, also where an expert acted; None where it isn't known.
        base_chunk: (H, A) normalised, what the policy's flow gave, before anything was added to it or it was limited.
    """

    observation: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32] | None
    reference: npt.NDArray[np.float32]
    active: bool
    steered: npt.NDArray[np.bool_]
    noise: npt.NDArray[np.float32]
    start_time: float
    chunk: npt.NDArray[np.float32]
    intervened: bool
    step_observations: npt.NDArray[np.float32]
    step_actions: npt.NDArray[np.float32]
    rewards: npt.NDArray[np.float32]
    base_noise: npt.NDArray[np.float32] | None = None
    base_chunk: npt.NDArray[np.float32] | None = None


@dataclass
class Episode:
    """One finished episode.

    Attributes:
        seed: what it descends from.
        success: whether the goal was reached.
        steps: environment steps.
        chunks: decisions of the policy.
        rewards: sum of rewards.
        evaluations: field evaluations.
        queries: questions to the reasoner.
        agreement: mean cosine between asked and executed motion, over the chunks that had a reference; NaN without.
        round_trip_error: mean distance between reference and executed chunk, normalised units.
        noise_percentile: mean percentile of the start noise's norm under the prior.
        frames: the images, where it was filmed: one before the first step and one after each.
        directions: what the reasoner said at each chunk, where it was filmed.
        moments: where the gripper was at each chunk, (3,) metres, where it was filmed.
        chunk_steps: how many actions of each chunk were executed.
        decisions: every decision, where it was recorded.
    """

    seed: int
    success: bool = False
    steps: int = 0
    chunks: int = 0
    rewards: float = 0.0
    evaluations: int = 0
    queries: int = 0
    agreement: float = float("nan")
    round_trip_error: float = float("nan")
    noise_percentile: float = float("nan")
    frames: list[Image] = field(default_factory=list)
    directions: list[Direction] = field(default_factory=list)
    moments: list[npt.NDArray[np.float64]] = field(default_factory=list)
    chunk_steps: list[int] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)


class _Averages:
    """Means over an episode's chunks, NaN left out."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(value)

    def mean(self, name: str) -> float:
        values = [value for value in self._values.get(name, []) if not np.isnan(value)]
        return float(np.mean(values)) if values else float("nan")


def run_episodes(
    policy: SteeredPolicy,
    env: VectorEnv,
    seeds: Sequence[int],
    make_reasoner: MakeReasoner | None = None,
    *,
    convention: Convention = OGBENCH,
    film: bool = False,
    record: bool = False,
    max_chunks: int | None = None,
    on_episode: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Run one episode a seed and return them in the order of the seeds.

    Args:
        policy: the steered policy; its chunks are executed open loop, as far as its action space says.
        env: where to run; all its rows are used.
        seeds: one a episode.
        make_reasoner: makes the reasoner of a row; None: nobody gives references.
        convention: how directions are written into references.
        film: keep a frame of every step (the environment must be able to render).
        record: keep every decision.
        max_chunks: end every episode after this many chunks, if it isn't over before; None: let it come to its end.
        on_episode: called with each episode as it finishes.

    Raises:
        InvalidInputError: no seeds, or a number is out of range.
        MismatchError: policy and environment don't fit.
        RenderingError: the policy looks, or a film is wanted, and this machine can't draw.
        WorkerError: a simulator failed.
    """
    if not seeds:
        raise InvalidInputError("no episodes were asked for; give at least one seed.")
    if max_chunks is not None:
        COUNT.check("max_chunks", max_chunks)
    spec = policy.action_spec
    eyes = Eyes(policy, env)
    rows = min(env.num_envs, len(seeds))
    waiting = list(range(len(seeds)))[::-1]
    playing: dict[int, int] = {}
    episodes = [Episode(seed) for seed in seeds]
    averages = [_Averages() for _ in seeds]
    reasoners = [make_reasoner() for _ in range(env.num_envs)] if make_reasoner is not None else None
    # Rows without an episode keep their last state and are computed along, so the batch never changes its shape.
    noise = RowGenerators([0] * env.num_envs)

    def begin(row: int) -> int:
        index = waiting.pop()
        playing[row] = index
        seed = seeds[index]
        noise.reseed(row, child_seed(seed, "policy"))
        if reasoners is not None:
            reasoners[row].reset(child_seed(seed, "reasoner"))
        return child_seed(seed, "environment")

    fresh = {row: begin(row) for row in range(rows)}
    batch = env.reset({row: fresh.get(row, 0) for row in range(env.num_envs)})
    while playing:
        active = sorted(playing)
        directions = [Direction(defer=True)] * env.num_envs
        reference = None
        if reasoners is not None:
            for row in active:
                directions[row] = reasoners[row].decide(seen_by(reasoners[row], env, batch, row))
                episodes[playing[row]].queries += 1
            reference = to_reference(directions, spec, convention)
        if film:
            _film_before(episodes, playing, env, batch, directions)
        before = batch.observation
        plan = policy.act(eyes.see(before, active), reference, noise)
        actions = plan.actions[:, : spec.executed].cpu().numpy()
        batch = env.execute(actions, rows=active, record=active if film else ())
        if record:
            for row in active:
                episodes[playing[row]].decisions.append(decision_of(plan, batch, row, before[row]))
        fresh = {}
        for row in active:
            index = playing[row]
            _account(episodes[index], averages[index], plan, batch, row)
            if batch.done[row] or episodes[index].chunks == max_chunks:
                _close(episodes[index], averages[index])
                if on_episode is not None:
                    on_episode(episodes[index])
                del playing[row]
                if waiting:
                    fresh[row] = begin(row)
        if fresh:
            batch = env.reset(fresh)
    return episodes


def seen_by(reasoner: Reasoner, env: VectorEnv, batch: Batch, row: int) -> View:
    """Return what a reasoner is shown of a row: the simulator's account, and an image for one that looks."""
    view: dict[str, npt.NDArray[Any]] = dict(batch.view(row))
    if getattr(reasoner, "looks", False):
        view["image/front"] = env.render(row)
    return view


def decision_of(
    plan: Plan,
    batch: Batch,
    row: int,
    observation: npt.NDArray[np.float32],
) -> Decision:
    """Return one row's decision.

    Args:
        plan: what was decided.
        batch: what came of it.
        row: the row.
        observation: (O,) its state before.
    """
    seen = np.concatenate([observation[None], batch.paths[row][:-1]])
    return decision_from(plan, row, seen, batch.rewards[row, : batch.steps[row]].astype(np.float32))


def decision_from(
    plan: Plan,
    row: int,
    seen: npt.NDArray[np.float32],
    rewards: npt.NDArray[np.float32],
    *,
    intervened: bool = False,
    base: Plan | None = None,
) -> Decision:
    """Return one row's decision, of which T actions were executed.

    Args:
        plan: what was decided.
        row: the row.
        seen: (T, O) before each executed action.
        rewards: (T,).
        intervened: whether an expert acted, and not the policy.
        base: what the policy's own flow would have given; None: the plan itself is its.
    """
    chunk, base = plan.chunk[row], plan if base is None else base
    reference, active, steered = torch.zeros_like(chunk), False, torch.zeros_like(chunk, dtype=torch.bool)
    if plan.reference is not None and bool(plan.reference.active[row]):
        reference, active, steered = plan.reference.chunk[row], True, plan.reference.steered[row]
    return Decision(
        observation=seen[0],
        features=None if plan.features is None else _array(plan.features[row]),
        reference=_array(reference),
        active=active,
        steered=steered.cpu().numpy(),
        noise=_array(plan.noise[row]),
        start_time=float(plan.start_time[row]),
        chunk=_array(chunk),
        intervened=intervened,
        step_observations=seen,
        step_actions=_array(plan.actions[row, : len(rewards)]),
        rewards=rewards,
        base_noise=_array(base.noise[row]),
        base_chunk=_array(base.base_chunk[row]),
    )


def _array(tensor: Tensor) -> npt.NDArray[np.float32]:
    array: npt.NDArray[np.float32] = tensor.float().cpu().numpy()
    return array


def _account(episode: Episode, averages: _Averages, plan: Plan, batch: Batch, row: int) -> None:
    episode.success = episode.success or bool(batch.success[row])
    episode.steps += int(batch.steps[row])
    episode.chunks += 1
    episode.rewards += float(batch.rewards[row].sum())
    episode.evaluations += plan.evaluations
    episode.frames.extend(batch.frames[row])
    episode.chunk_steps.append(int(batch.steps[row]))
    averages.add(
        agreement=float(plan.agreement[row]),
        round_trip_error=float(plan.round_trip_error[row]),
        noise_percentile=float(plan.noise_percentile[row]),
    )


def _close(episode: Episode, averages: _Averages) -> None:
    episode.agreement = averages.mean("agreement")
    episode.round_trip_error = averages.mean("round_trip_error")
    episode.noise_percentile = averages.mean("noise_percentile")


def _film_before(
    episodes: list[Episode], playing: dict[int, int], env: VectorEnv, batch: Batch, directions: list[Direction]
) -> None:
    for row, index in playing.items():
        episode = episodes[index]
        if not episode.frames:
            episode.frames.append(env.render(row))
        episode.directions.append(directions[row])
        episode.moments.append(batch.view(row)["proprio/effector_pos"])
