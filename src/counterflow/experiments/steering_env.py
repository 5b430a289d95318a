"""Steering as a reinforcement learning environment: the action is a latent noise, a residual, or both; the frozen flow is inside.

One step is one chunk: the flow turns the action into H actions, which are executed open loop, and the step's reward is their
discounted sum. An episode that is solved is *terminated*; one that runs out of time is *truncated*, and its value goes on.

`SteeringEnv` is a gymnasium environment, so any library learns on it; `SteeringVectorEnv` steers many at once, with one batch
through the flow. Both, and this library's own training, stand on `SteeredRows`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.spaces import Box
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space
from torch import Tensor

from counterflow.checks import COUNT, RATE, check_name
from counterflow.envs import Batch, VectorEnv, make_env
from counterflow.errors import InvalidInputError, TrainingError
from counterflow.experiments.evaluate import load_prior
from counterflow.experiments.rollout import Decision
from counterflow.experiments.sight import Eyes
from counterflow.policies import BasePolicy
from counterflow.random import check_seed, child_seed, draw_prior, generator
from counterflow.steering import Decided, SteeringSpace

RewardKind = Literal["success", "cost", "dense"]
Array = npt.NDArray[np.float32]
REPEATED = 1e-5
"""How far from where it was left an observation may lie when its episode is executed again, as a share of its size (at the least
of 1). The simulators here repeat themselves bit by bit; another processor may round otherwise."""


def value_range(reward: RewardKind, discount: float, horizon: int) -> tuple[float | None, float | None]:
    """Return the least and the greatest return that a reward allows; None where that isn't known.

    Args:
        reward: see `SteeredRows`.
        discount: gamma of an environment step.
        horizon: executed steps of a chunk.
    """
    if reward == "success":
        return 0.0, 1.0
    if reward == "cost":
        return (-1 / (1 - discount**horizon) if discount < 1 else None), 0.0
    return None, None


@dataclass(frozen=True)
class Step:
    """What came of one chunk on every row.

    Attributes:
        shown: (N, F) what the learner sees afterwards; of an episode that ended, at its end.
        rewards: (N,) discounted sums over the chunk.
        discounts: (N,) what the value of `shown` counts: discount^executed, and 0 where the episode was solved.
        terminated: (N,) bool, solved or otherwise in a final state.
        truncated: (N,) bool, out of time.
        success: (N,) bool.
        steps: (N,) int64, executed actions.
        decided: noises, base chunks and executed actions.
    """

    shown: Tensor
    rewards: Tensor
    discounts: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    steps: Tensor
    decided: Decided

    @property
    def done(self) -> Tensor:
        """(N,) bool: the episode is over."""
        return self.terminated | self.truncated


@dataclass(frozen=True)
class Taken:
    """A decision that was executed in an episode that goes on: what going on from a checkpoint needs of it.

    Attributes:
        actions: (E, A) what was executed, environment units.
        noise: (H, A + padding) where the flow started.
        base: (H, A + padding) what it gave, normalised.
        chunk: (H, A + padding) what was to be executed, normalised.
    """

    actions: Array
    noise: Array
    base: Array
    chunk: Array


class SteeredRows:
    """Episodes side by side, each steered by an action a chunk.

    A row's episodes descend from its own seed, one after the other, and so does the prior's noise in them: a row does not depend
    on which others run beside it.

    Args:
        env: the simulators; all rows are used.
        space: what an action means.
        seeds: one a row.
        discount: gamma of an environment step.
        reward: "success": 1 where the task is solved, else 0; "cost": -1 a chunk, 0 where it is solved (DSRL on pi0); "dense":
            the environment's own (OGBench: minus the number of sub-goals that are not reached).
        max_chunks: truncate episodes after so many chunks; None: when the environment does.
        recording: keep every decision of the present episodes in `decisions`.

    Raises:
        MismatchError: policy and environment don't fit.
        InvalidInputError: a number is out of range.
        UnknownNameError: no such reward.
    """

    def __init__(
        self,
        env: VectorEnv,
        space: SteeringSpace,
        seeds: Sequence[int],
        *,
        discount: float = 0.99,
        reward: RewardKind = "success",
        max_chunks: int | None = None,
        recording: bool = False,
    ) -> None:
        self._eyes = Eyes(space.policy, env)
        if len(seeds) != env.num_envs:
            raise InvalidInputError(f"{len(seeds)} seeds were given for {env.num_envs} environments; give one each.")
        RATE.check("the discount", discount)
        check_name("reward", reward, RewardKind)
        if max_chunks is not None:
            COUNT.check("max_chunks", max_chunks)
        self.env, self.space, self.discount, self.reward, self.max_chunks = env, space, discount, reward, max_chunks
        self.seeds = [check_seed(seed) for seed in seeds]
        self.episodes = [-1] * len(seeds)  # the number of each row's present episode
        self.history: list[list[Taken]] = [[] for _ in seeds]  # what was executed in it
        self.recording = recording
        self.decisions: list[list[Decision]] = [[] for _ in seeds]  # the same, with all that a recording holds
        self._rngs = [generator(0) for _ in seeds]
        self._observation = np.zeros((len(seeds), env.spec.observation_dim), np.float32)
        self._fresh: Tensor = self._draw(range(len(seeds)))
        self._context: Any = None
        self._inputs = torch.empty(0)  # what the policy makes of what it sees
        self._base: Tensor | None = None
        self.shown = torch.empty(0)
        self.evaluations = 0  # of the field, all rows

    def __len__(self) -> int:
        """Return N, the number of rows."""
        return len(self.seeds)

    @property
    def observation(self) -> Array:
        """(N, O) the environments' state, which is what a frozen policy on states sees."""
        return self._observation

    @property
    def context(self) -> Any:
        """The frozen policy's context of what it sees."""
        return self._context

    @property
    def fresh(self) -> Tensor:
        """(N, H, A + padding) the prior's noise for the decisions to come."""
        return self._fresh

    def begin(self, rows: Sequence[int] | None = None) -> Tensor:
        """Begin the next episode on some rows, or on all; return what the learner sees on all, (N, F)."""
        chosen = range(len(self)) if rows is None else rows
        seeds = {}
        for row in chosen:
            self.episodes[row] += 1
            seeds[row] = self.seed_of(row)
        self._begin(seeds)
        return self._show(chosen)

    def resume(
        self,
        episodes: Sequence[int],
        history: Sequence[Sequence[Taken]],
        before: Callable[[int, int], None] | None = None,
        reached: Array | None = None,
    ) -> Tensor:
        """Go back to where rows were, by executing again what was executed in their present episodes.

        Args:
            episodes: each row's episode.
            history: what was executed in it.
            before: called with each row, and how many decisions ago it was, before a decision is executed again.
            reached: (N, O) the observations that were left, and have to come again; None: they are not known.

        Raises:
            TrainingError: a simulator did not come back to where it was left, or an observation, or what the policy makes of it,
                is not finite.
        """
        self.episodes = list(episodes)
        self._begin({row: self.seed_of(row) for row in range(len(self))})
        longest = max(len(chunks) for chunks in history)
        due: list[int] = list(range(len(self)))  # rows that were not looked at since they moved
        for turn in range(longest):
            rows = [row for row, chunks in enumerate(history) if turn < len(chunks)]
            actions = np.zeros((len(self), self.space.executed, self.env.spec.action_dim), np.float32)
            for row in rows:
                if before is not None:
                    before(row, len(history[row]) - turn)
                actions[row] = history[row][turn].actions
                self.history[row].append(history[row][turn])
            seen, features = self._observation.copy(), None
            if self.recording:
                self._encode(due)
                features, due = self._features(), rows
            batch = self.env.execute(actions, rows=rows)
            if self.recording:
                self._record(rows, seen, features, batch)
            self._observation[rows] = batch.observation[rows]
            self._fresh[rows] = self._draw(rows)
        if reached is not None:
            self._check_reached(reached)
        return self._show(due)

    @torch.no_grad()
    def step(self, actions: Tensor) -> Step:
        """Execute one chunk on every row; rows whose episode ended wait for `begin`.

        Args:
            actions: (N, D).

        Raises:
            TrainingError: an action, the flow's chunk, a reward or an observation, also one within the chunk, or what the policy
                makes of it, is not finite.
        """
        self._check("the action", _finite(actions))
        decided = self.space.decide(self._context, actions, self._fresh, self._base)
        if self._base is None:
            self.evaluations += len(self) * self.space.steps
        self._check("the flow's chunk", _finite(decided.base))  # not what is executed: limits make a number of infinity
        taken = [one.float().cpu().numpy() for one in (decided.actions, decided.noise, decided.base, decided.chunk)]
        features = self._features() if self.recording else None
        batch = self.env.execute(taken[0])
        self._check("the reward", np.isfinite(batch.rewards))
        self._check("the observation", map(np.isfinite, batch.paths))
        for row in range(len(self)):
            self.history[row].append(Taken(*(one[row].copy() for one in taken)))
        if self.recording:
            self._record(range(len(self)), self._observation, features, batch)
        terminated = batch.terminated | batch.success
        late = np.array([self.max_chunks is not None and len(one) >= self.max_chunks for one in self.history])
        truncated = (batch.truncated | late) & ~terminated
        powers = self.discount ** np.arange(batch.rewards.shape[1])
        if self.reward == "dense":
            rewards = batch.rewards @ powers
        elif self.reward == "cost":
            rewards = np.where(batch.success, 0.0, -1.0)
        else:
            rewards = np.where(batch.success, self.discount ** (batch.steps - 1.0), 0.0)
        self._observation = batch.observation.copy()
        self._fresh = self._draw(range(len(self)))
        shown = self._show(range(len(self)))
        return Step(
            shown,
            torch.from_numpy(rewards).float(),
            torch.from_numpy(np.where(terminated, 0.0, self.discount**batch.steps)).float(),
            torch.from_numpy(terminated),
            torch.from_numpy(truncated),
            torch.from_numpy(batch.success),
            torch.from_numpy(batch.steps),
            decided,
        )

    def _begin(self, seeds: dict[int, int]) -> None:
        batch = self.env.reset({row: child_seed(seed, "environment") for row, seed in seeds.items()})
        # Where there are no features, what was shown is this very array, and it is in others' hands.
        self._observation = self._observation.copy()
        for row, seed in seeds.items():
            self._rngs[row] = generator(child_seed(seed, "policy"))
            self._observation[row] = batch.observation[row]
            self.history[row], self.decisions[row] = [], []
        self._check("the observation", np.isfinite(self._observation)[:, None], first=0)
        self._fresh[list(seeds)] = self._draw(list(seeds))

    def _draw(self, rows: Sequence[int]) -> Tensor:
        spec = self.space.policy.action_spec
        shape = (spec.horizon, spec.state_dim)
        return torch.stack([draw_prior(self._rngs[row], shape, "cpu", spec.prior) for row in rows])

    @torch.no_grad()
    def _encode(self, rows: Sequence[int]) -> None:
        """Let the policy see the present, of which these rows are new to it."""
        self._context, self._inputs = self.space.encode(self._eyes.see(self._observation, rows))

    @torch.no_grad()
    def _show(self, rows: Sequence[int]) -> Tensor:
        """Encode the present observations, of which these rows are new; return what the learner sees."""
        self._encode(rows)
        inputs = self._inputs
        self._check("what the policy makes of the observation", _finite(inputs))
        if self.space.show_base:
            self._base = self.space.denoise(self._context, self._fresh.to(self.space.device))
            self._check("the flow's chunk", _finite(self._base))
            self.evaluations += len(self) * self.space.steps
            inputs = torch.cat([inputs, self._base.flatten(1)], dim=1)
        self.shown = inputs
        return inputs

    def _features(self) -> Array | None:
        """Return what the policy makes of the present observations, (N, F), where it offers features."""
        if not hasattr(self.space.policy, "features"):
            return None
        inputs: Array = self._inputs.cpu().numpy()
        return inputs

    def _record(self, rows: Sequence[int], seen: Array, features: Array | None, batch: Batch) -> None:
        """Keep what was executed last on some rows, and what came of it, as decisions of a recording."""
        for row in rows:
            taken, steps = self.history[row][-1], int(batch.steps[row])
            self.decisions[row].append(
                Decision(
                    observation=seen[row].copy(),
                    features=None if features is None else features[row],
                    reference=np.zeros_like(taken.chunk),
                    active=False,
                    steered=np.zeros(taken.chunk.shape, np.bool_),
                    noise=taken.noise,
                    start_time=0.0,
                    chunk=taken.chunk,
                    intervened=False,
                    step_observations=np.concatenate([seen[row][None], batch.paths[row][:-1]]).astype(np.float32),
                    step_actions=taken.actions[:steps],
                    rewards=batch.rewards[row, :steps].astype(np.float32),
                    base_noise=taken.noise,
                    base_chunk=taken.base,
                )
            )

    def seed_of(self, row: int) -> int:
        """Return what a row's present episode descends from."""
        return child_seed(self.seeds[row], "online", self.episodes[row])

    def _check(self, what: str, finite: Iterable[npt.NDArray[np.bool_]], first: int = 1) -> None:
        """Check every row's answers, (T, ...) of the first T steps of its coming chunk, which count from `first`."""
        for row, answers in enumerate(finite):
            if not answers.all():
                sound = answers.reshape(len(answers), -1).all(axis=1)
                done, step = len(self.history[row]), int(np.argmin(sound)) + first
                raise TrainingError(
                    f"{what} of {self._named(row)} is not finite at step {done * self.space.executed + step} (chunk {done + 1}) "
                    f"of its episode {self.episodes[row]}. The last checkpoint is safe; look at what the environment or the "
                    "policy does there."
                )

    def _check_reached(self, reached: Array) -> None:
        away = np.abs(self._observation - reached)
        back = away <= REPEATED * np.maximum(1, np.abs(reached))  # not where either is no number
        if not back.all():
            row = int(np.argmin(back.all(axis=1)))
            worst = int(np.argmax(away[row]))
            raise TrainingError(
                f"{self._named(row)} did not come back to where it was left: the {len(self.history[row])} chunks of its episode "
                f"{self.episodes[row]} were executed again, and led elsewhere, in number {worst} of the observation by "
                f"{away[row, worst]:.3g} ({self._observation[row, worst]:.6g}, and was {reached[row, worst]:.6g}). Its simulator "
                "does not repeat itself, or is not the one that the run was begun with; expected the same numbers. The last "
                "checkpoint is safe, and so is what was learned until then: go on with the versions, and on the machine, of "
                "before, or make the simulator depend on its seed alone and begin a new run."
            )

    def _named(self, row: int) -> str:
        return f"environment {row} ({self.env.spec.name}, seed {self.seed_of(row)})"


def _finite(values: Tensor) -> npt.NDArray[np.bool_]:
    """Say whether each row of values (N, ...) is finite, (N, 1): no more than that leaves the device."""
    found: npt.NDArray[np.bool_] = torch.isfinite(values).flatten(1).all(1, keepdim=True).cpu().numpy()
    return found


def _spaces(rows: SteeredRows) -> tuple[Any, Any]:
    """Return the spaces of one row's observations and actions."""
    seen = rows.begin().shape[1]
    limits = rows.space.limits.numpy()
    return Box(-np.inf, np.inf, (seen,), np.float32), Box(-limits, limits, dtype=np.float32)


class SteeringEnv(gymnasium.Env[Array, Array]):
    """One task, steered: a gymnasium environment.

    Observations are what the frozen policy makes of the state (its features), with the base's chunk beside them where the space
    shows it. `info` holds `success`, `discount` (what the next value counts), `steps` (executed actions), `noise` and `chunk`
    (normalised). Libraries with a single discount a step want `discount ** executed`.

    Args:
        env: the task's name, or a vector environment of one row.
        space: what an action means; or a policy, steered by its latent.
        discount, reward, max_chunks: as for `SteeredRows`.
        seed: what episodes descend from until `reset` is given another.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(
        self,
        env: str | VectorEnv,
        space: SteeringSpace | BasePolicy | None = None,
        *,
        discount: float = 0.99,
        reward: RewardKind = "success",
        max_chunks: int | None = None,
        seed: int = 0,
    ) -> None:
        self._vector = make_env(env, 1, seed, workers=0) if isinstance(env, str) else env
        chosen = load_prior(self._vector.spec.name) if space is None else space
        chosen = chosen if isinstance(chosen, SteeringSpace) else SteeringSpace(chosen)
        self.rows = SteeredRows(self._vector, chosen, [seed], discount=discount, reward=reward, max_chunks=max_chunks)
        self.observation_space, self.action_space = _spaces(self.rows)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        """Begin an episode: the next one, or the first that descends from `seed`."""
        super().reset(seed=seed, options=options)
        if seed is not None:
            self.rows.seeds, self.rows.episodes = [child_seed(seed % (2**31 - 1), "steering")], [-1]
        return self.rows.begin()[0].cpu().numpy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        """Execute one chunk: (observation, reward, terminated, truncated, info)."""
        made = self.rows.step(torch.as_tensor(np.asarray(action, np.float32))[None])
        return (
            made.shown[0].cpu().numpy(),
            float(made.rewards[0]),
            bool(made.terminated[0]),
            bool(made.truncated[0]),
            {name: value[0] for name, value in _info(made).items()},
        )

    def close(self) -> None:
        """Free the simulator."""
        self._vector.close()


class SteeringVectorEnv(gymnasium.vector.VectorEnv[Array, Array, Array]):
    """Many episodes of a task, steered: a gymnasium vector environment that begins anew in the step that ends an episode.

    `info["final_obs"]` holds, as an array of objects, the last observations of episodes that ended.

    Args:
        env: the task's name, or a vector environment.
        space, discount, reward, max_chunks, seed: as for `SteeringEnv`.
        num_envs: N, where a name is given.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - gymnasium's own declaration

    def __init__(
        self,
        env: str | VectorEnv,
        space: SteeringSpace | BasePolicy | None = None,
        num_envs: int = 4,
        *,
        discount: float = 0.99,
        reward: RewardKind = "success",
        max_chunks: int | None = None,
        seed: int = 0,
    ) -> None:
        self._vector = make_env(env, num_envs, seed) if isinstance(env, str) else env
        chosen = load_prior(self._vector.spec.name) if space is None else space
        chosen = chosen if isinstance(chosen, SteeringSpace) else SteeringSpace(chosen)
        self.num_envs = self._vector.num_envs
        self.rows = SteeredRows(
            self._vector,
            chosen,
            [child_seed(seed, "row", row) for row in range(self.num_envs)],
            discount=discount,
            reward=reward,
            max_chunks=max_chunks,
        )
        self.single_observation_space, self.single_action_space = _spaces(self.rows)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,  # noqa: ARG002 - gymnasium's signature
    ) -> tuple[Array, dict[str, Any]]:
        """Begin episodes on all rows: the next ones, or the first that descend from `seed`."""
        if isinstance(seed, list):
            if len(seed) != self.num_envs:
                raise InvalidInputError(
                    f"{len(seed)} seeds were given for {self.num_envs} environments; give one each."
                )
            given = [
                before if one is None else child_seed(one % (2**31 - 1), "row")
                for one, before in zip(seed, self.rows.seeds, strict=True)
            ]
        elif seed is not None:
            given = [child_seed(seed % (2**31 - 1), "row", row) for row in range(self.num_envs)]
        if seed is not None:  # a row without a seed of its own goes on to its next episode
            kept = [row for row in range(self.num_envs) if isinstance(seed, list) and seed[row] is None]
            self.rows.episodes = [one if row in kept else -1 for row, one in enumerate(self.rows.episodes)]
            self.rows.seeds = given
        return self.rows.begin().cpu().numpy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        """Execute one chunk on every row; those that end begin anew."""
        made = self.rows.step(torch.as_tensor(np.asarray(actions, np.float32)))
        info, shown, done = _info(made), made.shown, made.done.numpy()
        if done.any():
            last, over = made.shown.cpu().numpy(), np.flatnonzero(done).tolist()
            ends = np.full(self.num_envs, None, object)  # np.array would make a table of numbers where every row ended
            for row in over:
                ends[row] = last[row]
            info["final_obs"], info["_final_obs"] = ends, done
            shown = self.rows.begin(over)
        rewards: Any = made.rewards.numpy()
        terminated: Any = made.terminated.numpy()
        truncated: Any = made.truncated.numpy()
        return shown.cpu().numpy(), rewards, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:  # noqa: ARG002 - gymnasium's signature
        """Free the simulators."""
        self._vector.close()


def _info(made: Step) -> dict[str, Any]:
    return {
        "success": made.success.numpy(),
        "discount": made.discounts.numpy(),
        "steps": made.steps.numpy(),
        "noise": made.decided.noise.cpu().numpy(),
        "chunk": made.decided.chunk.cpu().numpy(),
    }
