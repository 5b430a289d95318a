"""Vectorised stepping: rows in worker processes behave as one environment would."""

import os
import signal

import numpy as np
import pytest

from counterflow.envs import VectorEnv, make_env, vector
from counterflow.envs.ogbench import OGBenchEnv
from counterflow.errors import InvalidInputError, WorkerError

NAME = "ogbench/cube-single-task1"


@pytest.fixture(scope="module")
def pair() -> VectorEnv:
    with make_env(NAME, 3, workers=2) as env:
        yield env


def test_chunks_in_workers_equal_single_steps_in_process(pair: VectorEnv) -> None:
    chunks = np.random.default_rng(0).uniform(-1, 1, (4, 3, 5, 5))
    pair.reset([11, 12, 13])
    for chunk in chunks:
        batch = pair.execute(chunk)
    alone = OGBenchEnv(NAME)
    for row, seed in enumerate([11, 12, 13]):
        alone.reset(seed)
        for chunk in chunks:
            moments = [alone.step(action) for action in chunk[row]]
        np.testing.assert_array_equal(batch.observation[row], moments[-1].observation)
        np.testing.assert_array_equal(batch.rewards[row], [moment.reward for moment in moments])
        np.testing.assert_array_equal(batch.view(row)["goal/block_0_pos"], moments[-1].privileged["goal/block_0_pos"])


def test_rows_can_be_reset_and_stepped_alone(pair: VectorEnv) -> None:
    first = pair.reset([1, 2, 3])
    moved = pair.execute(np.ones((3, 2, 5)), rows=[1])
    assert moved.steps.tolist() == [0, 2, 0]
    np.testing.assert_array_equal(moved.observation[[0, 2]], first.observation[[0, 2]])
    assert not np.array_equal(moved.observation[1], first.observation[1])
    again = pair.reset({1: 2})
    np.testing.assert_array_equal(again.observation, first.observation)


def test_a_chunk_stops_where_the_episode_ends(pair: VectorEnv) -> None:
    pair.reset([1, 2, 3])
    for _ in range(28):
        batch = pair.execute(np.zeros((3, 7, 5)))
    assert not batch.done.any()
    batch = pair.execute(np.zeros((3, 7, 5)))
    assert batch.truncated.all()
    assert batch.steps.tolist() == [4, 4, 4]
    assert (batch.rewards[:, 4:] == 0).all()
    with pytest.raises(InvalidInputError, match="reset them before stepping"):
        pair.execute(np.zeros((3, 7, 5)))


def test_resets_without_seeds_descend_from_the_environments_seed() -> None:
    with make_env(NAME, 1, seed=5, workers=0) as one, make_env(NAME, 1, seed=5, workers=0) as other:
        first = one.reset().observation
        np.testing.assert_array_equal(first, other.reset().observation)
        assert not np.array_equal(first, one.reset().observation)


def test_shapes_and_rows_are_checked(pair: VectorEnv) -> None:
    pair.reset([1, 2, 3])
    with pytest.raises(InvalidInputError, match=r"\(3, H, 5\)"):
        pair.execute(np.zeros((3, 5)))
    with pytest.raises(InvalidInputError, match="do not exist"):
        pair.execute(np.zeros((3, 1, 5)), rows=[3])
    with pytest.raises(InvalidInputError, match="one each"):
        pair.reset([1])


def test_an_error_in_a_worker_reaches_the_caller_and_the_worker_lives_on(pair: VectorEnv) -> None:
    pair.reset([1, 2, 3])
    with pytest.raises(InvalidInputError, match="finite") as caught:
        pair.execute(np.full((3, 1, 5), np.nan))
    assert "In the worker process" in caught.value.__notes__[0]
    assert pair.execute(np.zeros((3, 1, 5))).steps.tolist() == [1, 1, 1]


def test_a_killed_worker_is_reported_and_close_still_works() -> None:
    env = make_env(NAME, 2, workers=2)
    env.reset()
    os.kill(env._workers[0]._process.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match=r"environments 0 to 0 died \(exit code -9"):
        env.execute(np.zeros((2, 1, 5)))
    env.close()
    env.close()


def test_a_worker_that_hangs_is_ended_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    env = make_env(NAME, 2, workers=2)
    env.reset()
    worker = env._workers[0]._process
    os.kill(worker.pid, signal.SIGSTOP)
    monkeypatch.setattr(vector, "PATIENCE", 1)
    with pytest.raises(WorkerError, match=r"environments 0 to 0 did not answer within 1 s"):
        env.execute(np.zeros((2, 1, 5)))
    env.close()
    assert worker.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("num_envs", [0, -1, 100_000])
def test_number_of_environments_is_checked(num_envs: int) -> None:
    with pytest.raises(InvalidInputError, match="num_envs"):
        make_env(NAME, num_envs)
