"""Demonstrations of many tasks: one archive a task, in worker processes, and what is there is not made again."""

from __future__ import annotations

from pathlib import Path

import pytest

from counterflow.data import EpisodeDataset
from counterflow.errors import InvalidInputError, UnknownNameError
from counterflow.experiments.demonstrate import archive_of, demonstrate, demonstrate_tasks

TASKS = ["metaworld/drawer-close-v3", "metaworld/handle-press-v3"]


def test_many_tasks_give_what_each_gives_alone(tmp_path: Path) -> None:
    pytest.importorskip("metaworld", reason="Meta-World is not installed: counterflow[metaworld]")
    seen: list[int] = []
    done = demonstrate_tasks(
        TASKS, tmp_path, episodes=2, seed=3, workers=2, on_task=lambda _, count: seen.append(count)
    )
    assert (seen, list(done.made), done.given_up) == ([1, 2], TASKS, {})
    alone = demonstrate(TASKS[1], tmp_path / "alone.npz", episodes=2, seed=3)
    assert archive_of(tmp_path, TASKS[1]).read_bytes() == alone.path.read_bytes()
    dataset = EpisodeDataset.load(done.made[TASKS[0]].path, keys=("rewards",))
    assert (dataset.num_episodes, dataset.observation_shape, dataset.action_dim) == (2, (39,), 4)

    archive_of(tmp_path, TASKS[0]).unlink()  # as if it had been killed before this one
    again = demonstrate_tasks(TASKS, tmp_path, episodes=2, seed=3, workers=1)
    assert {task: made.made for task, made in again.made.items()} == {TASKS[0]: True, TASKS[1]: False}


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean"):
        demonstrate_tasks(["metaworld/handle-pres-v3"], tmp_path)
    with pytest.raises(InvalidInputError, match="workers"):
        demonstrate_tasks(TASKS, tmp_path, workers=0)
