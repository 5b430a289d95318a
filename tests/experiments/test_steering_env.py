"""The steering environment: rewards, ends, repeatability, and another library learning on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import counterflow
from counterflow.envs import VectorEnv
from counterflow.errors import InvalidInputError, TrainingError
from counterflow.experiments import steering_env
from counterflow.experiments.steering_env import SteeredRows, SteeringEnv, SteeringVectorEnv
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy
from counterflow.steering import SteeringSpace

GUIDE = Path(__file__).parents[2] / "docs" / "reinforcement-learning.md"
TOWARDS = torch.full((1, 4), 1.5)


def rows_of(plane: Any, prior: FlowPolicy, count: int = 1, **changes: Any) -> SteeredRows:
    rows = SteeredRows(plane(count), SteeringSpace(prior), list(range(count)), **changes)
    rows.begin()
    return rows


def test_gymnasium_finds_nothing_wrong(plane: Any, prior: FlowPolicy) -> None:
    check_env(SteeringEnv(plane(), prior), skip_render_check=True)


@pytest.mark.parametrize("reward", ["success", "cost", "dense"])
def test_a_solved_episode_is_terminated_and_nothing_follows(reward: str, plane: Any, prior: FlowPolicy) -> None:
    rows = rows_of(plane, prior, discount=0.9, reward=reward)
    made = rows.step(TOWARDS)
    before = []
    while not made.done[0]:
        before.append(float(made.rewards[0]))
        assert made.discounts[0] == pytest.approx(0.81)
        made = rows.step(TOWARDS)
    assert made.success[0]
    assert made.terminated[0]
    assert not made.truncated[0]
    assert made.discounts[0] == 0
    executed = int(made.steps[0])
    wanted = {"success": 0.9 ** (executed - 1), "cost": 0.0, "dense": -sum(0.9**k for k in range(executed))}
    assert float(made.rewards[0]) == pytest.approx(wanted[reward])
    assert before == pytest.approx([{"success": 0.0, "cost": -1.0, "dense": -1.9}[reward]] * len(before))


def test_running_out_of_time_is_not_an_end(plane: Any, prior: FlowPolicy) -> None:
    rows = rows_of(plane, prior, discount=0.9)
    made = [rows.step(-TOWARDS) for _ in range(6)][-1]
    assert made.truncated[0]
    assert not made.terminated[0]
    assert made.discounts[0] == pytest.approx(0.81)
    short = rows_of(plane, prior, max_chunks=2)
    assert [bool(short.step(-TOWARDS).truncated[0]) for _ in range(2)] == [False, True]


def test_a_row_does_not_depend_on_the_others(plane: Any, prior: FlowPolicy) -> None:
    space = SteeringSpace(prior, "residual", show_base=True)
    three = SteeredRows(plane(3), space, [5, 6, 7])
    one = SteeredRows(plane(1), space, [6])
    many, alone = three.begin(), one.begin()
    for turn in range(8):
        torch.testing.assert_close(many[1], alone[0])
        actions = torch.randn(3, 4, generator=torch.Generator().manual_seed(turn))
        first, second = three.step(actions), one.step(actions[1:2])
        many, alone = first.shown, second.shown
        if second.done[0]:
            alone = one.begin()
        over = first.done.nonzero()[:, 0].tolist()
        many = three.begin(over) if over else many


def test_rows_go_on_from_what_was_executed(plane: Any, prior: FlowPolicy) -> None:
    space = SteeringSpace(prior, "residual", show_base=True)
    first = SteeredRows(plane(2), space, [1, 2])
    first.begin()
    for turn in range(3):
        first.step(torch.full((2, 4), 0.01 * turn))
        if turn == 0:
            first.begin([0])
    second = SteeredRows(plane(2), space, [1, 2])
    second.resume(first.episodes, first.history)
    assert torch.equal(first.shown, second.shown)
    assert torch.equal(first.fresh, second.fresh)
    assert torch.equal(first.step(torch.zeros(2, 4)).shown, second.step(torch.zeros(2, 4)).shown)


def test_going_on_notices_a_simulator_that_does_not_repeat_itself(plane: Any, prior: FlowPolicy) -> None:
    """What was executed is executed again, and leads elsewhere: the second row's, by a little."""
    first = rows_of(plane, prior, 2)
    for _ in range(2):
        first.step(torch.zeros(2, 4))
    left = first.observation.copy()
    second = SteeredRows(plane(2), SteeringSpace(prior), [0, 1])
    second.resume(first.episodes, first.history, reached=left)
    assert torch.equal(first.shown, second.shown)
    left[1, 0] += 0.01
    where = r"environment 1 \(plane, seed \d+\) .* 2 chunks of its episode 0 .* in number 0 of the observation by 0\.01"
    with pytest.raises(TrainingError, match=where):
        second.resume(first.episodes, first.history, reached=left)
    with pytest.raises(TrainingError, match="environment 0 .* by nan"):
        second.resume(first.episodes, first.history, reached=left * np.nan)


def test_the_vector_environment_begins_anew_and_keeps_the_last_observation(plane: Any, prior: FlowPolicy) -> None:
    env = SteeringVectorEnv(plane(2), prior, max_chunks=2)
    assert isinstance(env, gymnasium.vector.VectorEnv)
    env.reset(seed=3)
    away = np.stack([-TOWARDS[0].numpy()] * 2)
    env.step(away)
    observation, _, terminated, truncated, info = env.step(away)
    assert truncated.all()
    assert not terminated.any()
    assert all(np.abs(info["final_obs"][row] - observation[row]).max() > 0.1 for row in range(2))
    again = SteeringVectorEnv(plane(2), prior, max_chunks=2)
    np.testing.assert_array_equal(again.reset(seed=3)[0], env.reset(seed=3)[0])


def test_what_was_returned_stays_as_it_was(plane: Any) -> None:
    """A policy without features shows the state itself, and the next episode must not be written over the last."""
    policy = FieldPolicy(lambda x, t, seen: 0 * x, ActionSpec(2, 2, (-1.0,) * 2, (1.0,) * 2))
    env = SteeringVectorEnv(plane(2), policy, max_chunks=2)
    first, _ = env.reset(seed=3)
    away = np.stack([-TOWARDS[0].numpy()] * 2)
    returned = [first, env.step(away)[0]]
    observation, _, _, truncated, info = env.step(away)
    assert truncated.all()
    returned += [observation, *info["final_obs"]]
    assert info["final_obs"].shape == (2,)
    assert all(np.abs(info["final_obs"][row] - observation[row]).max() > 0.1 for row in range(2))
    kept = [one.copy() for one in returned]
    env.step(away)
    env.reset()
    for one, before in zip(returned, kept, strict=True):
        np.testing.assert_array_equal(one, before)


@pytest.mark.parametrize("spoil", ["reward", "observation"])
def test_a_value_that_is_no_number_stops_and_says_where(spoil: str, plane: Any, prior: FlowPolicy) -> None:
    rows = SteeredRows(plane(2, spoil), SteeringSpace(prior), [0, 1], reward="dense")
    rows.begin()
    rows.step(torch.zeros(2, 4))
    where = rf"the {spoil} of environment 0 \(plane, seed \d+\) is not finite at step 3 \(chunk 2\) of its episode 0"
    with pytest.raises(TrainingError, match=where):
        rows.step(torch.zeros(2, 4))


def test_an_observation_within_a_chunk_that_is_no_number_stops_too(
    plane: Any, prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody decides on it, and a recording would keep it."""
    rows = rows_of(plane, prior, 2)
    execute = VectorEnv.execute

    def spoilt(self: VectorEnv, *given: Any, **options: Any) -> Any:
        batch = execute(self, *given, **options)
        batch.paths[1][0, 0] = np.nan
        return batch

    rows.step(torch.zeros(2, 4))
    monkeypatch.setattr(VectorEnv, "execute", spoilt)
    with pytest.raises(TrainingError, match=r"the observation of environment 1 .* at step 3 \(chunk 2\)"):
        rows.step(torch.zeros(2, 4))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("ports", "show_base"), [("latent", False), ("both", False), ("residual", True)])
def test_a_frozen_flow_that_breaks_stops_and_says_where(ports: Any, show_base: bool, value: float, plane: Any) -> None:
    """It breaks on the right. Infinite actions would be clipped to sound ones; and where the base is shown no learner sees it."""

    def velocity(x: torch.Tensor, t: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return torch.where(seen[:, :1, None] > 0.3, value, 0 * x)

    policy = FieldPolicy(velocity, ActionSpec(2, 2, (-1.0,) * 2, (1.0,) * 2))
    space = SteeringSpace(policy, ports, residual_bound=4.0, show_base=show_base)
    rows = SteeredRows(plane(2), space, [0, 1])
    rows.begin()
    actions = torch.full((2, space.size), 4.0)
    actions[0] = -4
    where = (
        r"the flow's chunk of environment 1 \(plane, seed \d+\) is not finite at step 3 \(chunk 2\) of its episode 0"
    )
    if not show_base:
        rows.step(actions)
    with pytest.raises(TrainingError, match=where):
        rows.step(actions)
    assert len(rows.history[1]) == 1  # nothing was executed


def test_a_first_observation_that_is_no_number_stops_too(
    plane: Any, prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = plane(2)
    rows = SteeredRows(env, SteeringSpace(prior), [0, 1])
    reset = VectorEnv.reset

    def spoilt(self: VectorEnv, seeds: Any) -> Any:
        batch = reset(self, seeds)
        batch.observation[1] = np.nan
        return batch

    monkeypatch.setattr(VectorEnv, "reset", spoilt)
    with pytest.raises(TrainingError, match="the observation of environment 1 .* at step 0"):
        rows.begin()


def test_rows_without_a_seed_go_on_to_their_next_episode(plane: Any, prior: FlowPolicy) -> None:
    one, other = (SteeringVectorEnv(plane(2), prior, seed=4) for _ in range(2))
    first, _ = one.reset(seed=[5, 6])
    again, _ = other.reset(seed=[5, 6])
    np.testing.assert_array_equal(first, again)
    following, _ = one.reset()
    mixed, _ = other.reset(seed=[5, None])
    np.testing.assert_array_equal(mixed[0], first[0])
    np.testing.assert_array_equal(mixed[1], following[1])
    assert not np.array_equal(mixed[1], first[1])
    with pytest.raises(InvalidInputError, match="give one each"):
        one.reset(seed=[1])


def test_numbers_out_of_range(plane: Any, prior: FlowPolicy) -> None:
    with pytest.raises(InvalidInputError, match="one each"):
        SteeredRows(plane(2), SteeringSpace(prior), [0])
    with pytest.raises(InvalidInputError, match="discount"):
        SteeredRows(plane(), SteeringSpace(prior), [0], discount=0.0)


def typed(chunks: int) -> dict[str, Any]:
    """Do what the guide shows of stable-baselines3, with so many chunks; return the names that it leaves."""
    pytest.importorskip("stable_baselines3")
    (shown,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(), flags=re.DOTALL)
    lines, changed = re.subn(r"(?<=model\.learn\()[\d_]+", str(chunks), shown)
    assert changed == 1
    names: dict[str, Any] = {}
    exec(compile(lines, GUIDE.name, "exec"), names)
    return names


def test_stable_baselines_learns_on_it(plane: Any, prior: FlowPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guide's lines, a point on a plane in the place of their task: the policy finds the goal that it hardly found before."""
    monkeypatch.setattr(counterflow, "load", lambda name: prior, raising=False)
    monkeypatch.setattr(steering_env, "make_env", lambda *given, **options: plane())

    def successes(model: Any) -> int:
        env, found = SteeringEnv(plane(), prior, seed=7), 0
        for _ in range(20):
            (shown, _), done = env.reset(), False
            while not done:
                shown, _, terminated, truncated, info = env.step(model.predict(shown)[0])
                done = terminated or truncated
            found += bool(info["success"])
        return found

    frozen = {name: value.clone() for name, value in prior.state_dict().items()}
    assert successes(typed(1)["model"]) <= 6
    model = typed(250)["model"]
    assert successes(model) >= 18
    assert model.replay_buffer.size() == 250
    assert not model.replay_buffer.dones.all()
    assert all(torch.equal(value, frozen[name]) for name, value in prior.state_dict().items())


def test_the_guides_lines_of_stable_baselines_are_right_for_a_benchmark() -> None:
    assert typed(25)["model"].num_timesteps == 25
