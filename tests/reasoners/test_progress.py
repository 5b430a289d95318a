"""What is left to do, in metres: by hand, and in real environments while somebody who knows how acts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from counterflow.envs import make_env
from counterflow.reasoners import View, oracle_expert
from counterflow.reasoners.progress import FAR, WRONG_BUTTON, remaining


def view(**places: Any) -> View:
    """Names with "__" for "/"; the gripper is at the origin unless told."""
    given = {"proprio__effector_pos": (0, 0, 0), **places}
    return {name.replace("__", "/"): np.asarray(value, np.float64) for name, value in given.items()}


def cube(at: tuple[float, float, float], goal: tuple[float, float, float], number: int = 0) -> dict[str, Any]:
    return {f"privileged__block_{number}_pos": at, f"goal__block_{number}_pos": goal}


def buttons(states: list[int], goal: list[int]) -> dict[str, Any]:
    places = {f"privileged__button_{index}_top_pos": (0, 0, 1.0 + index) for index in range(len(states))}
    return {"privileged__button_states": states, "goal__button_states": goal, **places}


def slide(name: str, at: float, goal: float, handle: tuple[float, float, float]) -> dict[str, Any]:
    return {f"privileged__{name}_pos": [at], f"goal__{name}_pos": [goal], f"privileged__{name}_handle_pos": handle}


class TestByHand:
    def test_a_cube_to_its_goal_and_the_gripper_to_the_cube(self) -> None:
        assert remaining(view(**cube((0, 3, 4), (0, 3, 0)))) == pytest.approx(4 + 5)

    def test_the_gripper_counts_to_the_nearest_thing_out_of_place(self) -> None:
        """The cube that lies well is near, and does not count."""
        both = cube((0, 0, 0.1), (0, 0, 0.1)) | cube((0, 2, 0), (0, 5, 0), 1) | cube((0, 0, 1), (0, 0, 3), 2)
        assert remaining(view(**both)) == pytest.approx(3 + 2 + 1)

    def test_near_enough_is_there(self) -> None:
        assert remaining(view(**cube((1, 1, 0.9 * FAR), (1, 1, 0)))) == 0
        left = remaining(view(**cube((1, 0, 1.1 * FAR), (1, 0, 0))))
        assert left == pytest.approx(1.1 * FAR + np.hypot(1, 1.1 * FAR))

    def test_slides(self) -> None:
        places = slide("drawer", 0.1, -0.06, (0, 3, 4)) | slide("window", 0.1, 0.1, (0, 0, 1))
        assert remaining(view(**places)) == pytest.approx(0.16 + 5)
        places = slide("drawer", 0.0, 0.0, (0, 3, 4)) | slide("window", 0.05, 0.15, (0, 0, 1))
        assert remaining(view(**places)) == pytest.approx(0.1 + 1)

    def test_buttons(self) -> None:
        assert remaining(view(**buttons([0, 1, 1], [0, 0, 0]))) == pytest.approx(2 * WRONG_BUTTON + 2)
        assert remaining(view(**buttons([0, 1], [0, 1]))) == 0

    def test_everything_together_and_everything_done(self) -> None:
        places = cube((0, 0, 2), (0, 0, 1)) | slide("drawer", 0.2, 0, (0, 0, 9)) | buttons([1], [0])
        assert remaining(view(**places)) == pytest.approx(1 + 0.2 + WRONG_BUTTON + 1)
        places = cube((0, 0, 1), (0, 0, 1)) | slide("drawer", 0, 0, (0, 0, 9)) | buttons([0], [0])
        assert remaining(view(**places)) == 0


@pytest.mark.parametrize("name", ["ogbench/cube-single-task1", "ogbench/puzzle-3x3-task1"])
def test_it_falls_as_an_expert_solves_a_task(name: str) -> None:
    """Not at every step (a cube is lifted first), but over ten chunks of the policy's, and to little in the end."""
    with make_env(name, 1) as env:
        batch, expert, left = env.reset([1]), oracle_expert(name), list[float]()
        while not batch.done[0]:
            left.append(remaining(batch.view(0)))
            batch = env.step(expert.act(batch.view(0))[None])
    assert batch.success[0]
    assert remaining(batch.view(0)) < 0.3 * left[0]
    best = np.minimum.accumulate(left)
    assert (best[50:] < best[:-50] - 0.01).all()  # so nobody would take over from this expert
    assert remaining(batch.view(0)) <= best[-1]


def test_scenes_have_slides_buttons_and_a_cube() -> None:
    """The names are those of the real environment: moving any one of them away from its goal adds to what is left."""
    with make_env("ogbench/scene-task5", 1) as env:
        seen = env.reset([1]).view(0)
    done = dict(seen)
    for name in seen:
        if name.startswith("goal/") and "handle" not in name:
            done[name.replace("goal/", "privileged/")] = seen[name]
    assert remaining(done) == 0
    for name, change in (("drawer_pos", 0.1), ("window_pos", 0.1), ("block_0_pos", 0.1), ("button_states", 1.0)):
        moved = {**done, f"privileged/{name}": done[f"privileged/{name}"] + change}
        assert remaining(moved) > 0.09
