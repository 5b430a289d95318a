"""From an archive and a task to transitions with rewards."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from counterflow.data import (
    VALUE_GOALS,
    EpisodeDataset,
    GoalSampler,
    SliceStream,
    TransitionDataset,
    WindowSampler,
    collect,
)
from counterflow.envs.registry import make_task
from counterflow.errors import DatasetError, InvalidInputError, MismatchError, UnknownNameError
from counterflow.experiments.offline_data import find_data, load_transitions

POINT = "ogbench/pointmaze-medium-task4"


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes of a point that goes straight for a goal down the corridor, with noise, recorded as OGBench does."""
    env = make_task(POINT)
    episodes = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        moment = env.reset(seed)
        rows: dict[str, list[np.ndarray]] = {"observations": [], "actions": [], "qpos": []}
        env.simulator.set_xy(moment.privileged["goal/xy"] + [0.0, -3.0])  # type: ignore[attr-defined]
        position = moment.privileged["goal/xy"] + [0.0, -3.0]
        for _ in range(60):
            action = np.clip(rng.normal([0.0, 0.5], 0.3), -1, 1)
            rows["observations"].append(position.astype(np.float32))
            rows["qpos"].append(position.astype(np.float32))
            rows["actions"].append(action.astype(np.float32))
            position = env.step(action).privileged["privileged/qpos"]
        episodes.append({name: np.stack(values) for name, values in rows.items()})
    path = tmp_path_factory.mktemp("walked") / "pointmaze-medium-navigate.npz"
    EpisodeDataset.from_episodes(episodes).save(path)
    return path


def rewritten(path: Path, target: Path, drop: tuple[str, ...] = (), **arrays: np.ndarray) -> Path:
    """Write an archive again with some of its arrays changed."""
    with np.load(path) as archive:
        content = {name: archive[name] for name in archive.files if name not in drop}
    np.savez(target, **{**content, **arrays})
    return target


def test_rewards_of_a_maze_are_those_of_the_distance(walked: Path) -> None:
    data = load_transitions(walked, POINT)
    goal = make_task(POINT).reset(0).privileged["goal/xy"]
    near = np.linalg.norm(data.observations - goal, axis=1) <= 1.0
    assert data.num_transitions == 2 * 59
    assert data.lengths.tolist() == [59, 59]
    assert 5 < near.sum() < 110
    np.testing.assert_array_equal(data.rewards, near - 1.0)
    np.testing.assert_array_equal(data.masks, 1.0 - near)
    np.testing.assert_array_equal(data.next_observations[:58], data.observations[1:59])
    elsewhere = load_transitions(walked, "ogbench/pointmaze-medium-task5")
    assert elsewhere.masks.all()
    sampler = WindowSampler(data, 5)
    chunks = sampler.chunks(sampler.draw(32, torch.Generator().manual_seed(0)), 0.99)
    assert chunks.valid.all()
    with pytest.raises(DatasetError, match="horizon is 60 and the longest of 2 episodes has 59"):
        WindowSampler(data, 60)


def test_what_collect_wrote_is_relabelled_task_by_task(tmp_path: Path) -> None:
    made = collect(
        "ogbench/cube-single",
        kind="play",
        seed=0,
        episodes=2,
        validation_episodes=0,
        max_episode_steps=40,
        out=tmp_path / "cube.npz",
        workers=0,
    )
    data = load_transitions(made.path, "ogbench/cube-single-task2")
    assert data.lengths.tolist() == [39, 39]
    assert set(data.rewards.tolist()) <= {0.0, -1.0}
    goals = load_transitions(made.path, "ogbench/cube-single-goals")
    assert goals.observation_dim == data.observation_dim  # the goal comes of the data
    assert (goals.rewards == -1).all()
    sampler, rng = GoalSampler(goals, 5), torch.Generator().manual_seed(0)
    starts = sampler.draw(8, rng)
    chunks = sampler.chunks(starts, sampler.goals(starts, VALUE_GOALS, rng))
    assert chunks.observations.shape == (8, 2 * data.observation_dim)


def test_an_archives_own_rewards_come_first(walked: Path, tmp_path: Path) -> None:
    rewards = np.random.default_rng(0).integers(-3, 1, 120).astype(np.float32)
    path = rewritten(walked, tmp_path / "own.npz", rewards=rewards, masks=(rewards < 0) * 1.0)
    kept = np.delete(rewards, [59, 119])
    data = load_transitions(path, "ogbench/pointmaze-medium")
    np.testing.assert_array_equal(data.rewards, kept)
    np.testing.assert_array_equal(data.masks, kept < 0)
    sparse = load_transitions(path, POINT, sparse=True)
    np.testing.assert_array_equal(sparse.rewards, -(kept != 0).astype(np.float32))


def test_slices_become_transitions_in_turn(walked: Path, tmp_path: Path) -> None:
    for name in ("000", "001"):
        rewritten(walked, tmp_path / f"{name}.npz")
    rewritten(walked, tmp_path / "000-val.npz")

    def load(path: Path) -> tuple[str, TransitionDataset]:
        return path.stem, load_transitions(path, POINT)

    with SliceStream(tmp_path, load, every=2) as stream:
        assert [stream.at(update)[0] for update in range(5)] == ["000", "000", "001", "001", "000"]


def test_archives_that_do_not_serve_are_refused(walked: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"no rewards and masks, and no qpos.*it has actions"):
        load_transitions(rewritten(walked, tmp_path / "bare.npz", drop=("qpos",)), POINT)
    with pytest.raises(DatasetError, match="holds rewards alone"):
        load_transitions(rewritten(walked, tmp_path / "half.npz", rewards=np.zeros(120)), POINT)
    with pytest.raises(MismatchError, match="Use the environment that the data were collected in"):
        load_transitions(walked, "ogbench/antmaze-medium-task1")
    with pytest.raises(InvalidInputError, match="is a family of tasks"):
        load_transitions(walked, "ogbench/pointmaze-medium")
    with pytest.raises(UnknownNameError, match="pointmaze-medium"):
        load_transitions(walked, "ogbench/pointmaze-meduim-task1")
    with pytest.raises(DatasetError, match="there is no dataset at"):
        load_transitions(tmp_path / "nothing.npz", POINT)
    terminals = np.isin(np.arange(120), (0, 119))
    with pytest.raises(DatasetError, match="episode 0 has a single row"):
        load_transitions(rewritten(walked, tmp_path / "short.npz", terminals=terminals), POINT)
    (tmp_path / "cut.npz").write_bytes(walked.read_bytes()[:-200])
    with pytest.raises(DatasetError, match="is truncated, damaged"):
        load_transitions(tmp_path / "cut.npz", POINT)


def test_official_data_come_before_collected_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError, match=r"counterflow collect ogbench/cube-single .*\['cube-single-play-v0'\]"):
        find_data("ogbench/cube-single-task3")
    with pytest.raises(DatasetError, match=r"Fetch OGBench's own: .*\['antmaze-large-navigate-v0'\]"):
        find_data("ogbench/antmaze-large-task1")
    with pytest.raises(UnknownNameError, match="cube-single"):
        find_data("ogbench/cube-singel-task3")
    with pytest.raises(DatasetError, match="path of an archive"):
        find_data("metaworld/push-v3")
    collected, official = tmp_path / "data/cube-single-play.npz", tmp_path / ".ogbench/data/cube-single-play-v0.npz"
    for path in (collected, official):
        path.parent.mkdir(parents=True)
        path.touch()
        for name in ("ogbench/cube-single", "ogbench/cube-single-task3", "ogbench/cube-single-goals-task2"):
            assert find_data(name).resolve() == path
    maze = official.with_name("antmaze-large-navigate-v0.npz")
    maze.touch()
    assert find_data("ogbench/antmaze-large-task1") == maze
