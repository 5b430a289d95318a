"""LIBERO: names, splits and files anywhere; the simulator where its package and assets are."""

from __future__ import annotations

import importlib.util
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from counterflow.envs import env_names, expand_tasks, family_of, groups
from counterflow.envs import libero as module
from counterflow.envs.libero import LiberoEnv, assets_folder, names, read_init_states, sentence_of, suites
from counterflow.errors import MissingDependencyError, UnknownNameError

TASK = "libero/90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"


def missing() -> str:
    """Return what is missing for the simulator, or nothing."""
    if any(importlib.util.find_spec(package) is None for package in ("libero", "robosuite", "bddl")):
        return "LIBERO is not installed: counterflow[libero-simulator] and requirements-libero.txt"
    try:
        assets_folder()
    except MissingDependencyError:
        return "LIBERO's assets are not here: set COUNTERFLOW_LIBERO_ASSETS"
    return ""


MISSING = missing()
needs_libero = pytest.mark.skipif(bool(MISSING), reason=MISSING)


class TestNames:
    def test_five_suites_are_one_family(self) -> None:
        assert {suite: len(tasks) for suite, tasks in suites().items()} == {
            "spatial": 10,
            "object": 10,
            "goal": 10,
            "10": 10,
            "90": 90,
        }
        assert {*names()} < {*env_names()}
        assert family_of(TASK) == family_of("libero") == "libero"
        assert expand_tasks(["libero/goal"]) == [name for name in names() if name.startswith("libero/goal/")]

    @pytest.mark.parametrize(
        ("task", "sentence"),
        [
            ("KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet", "close the top drawer of the cabinet"),
            ("LIVING_ROOM_SCENE2_pick_up_the_milk", "pick up the milk"),
            ("put_the_bowl_on_the_plate", "put the bowl on the plate"),
        ],
    )
    def test_sentences(self, task: str, sentence: str) -> None:
        assert sentence_of(task) == sentence

    def test_an_unknown_task_suggests_the_nearest(self) -> None:
        with pytest.raises(UnknownNameError, match="put_the_black_bowl_on_the_plate"):
            LiberoEnv(TASK.replace("black", "blak"))

    @pytest.mark.parametrize(("family", "everything"), [("metaworld", "metaworld"), ("libero", "libero/90")])
    def test_the_split_leaves_nothing_out_and_nothing_twice(self, family: str, everything: str) -> None:
        found = groups()
        kinds = [found[f"{family}/held-out-{kind}"] for kind in ("goals", "pairs", "scenes")]
        assert all(kinds)
        held_out = [task for tasks in kinds for task in tasks]
        assert found[f"{family}/held-out"] == tuple(held_out)
        assert len(held_out) == len({*held_out})
        assert sorted([*held_out, *found[f"{family}/train"]]) == sorted(expand_tasks([everything]))

    def test_held_out_scenes_are_never_seen(self) -> None:
        found = groups()

        def scenes(tasks: tuple[str, ...]) -> set[str]:
            return {task.split("/")[-1].split("SCENE")[0] + task.split("SCENE")[1].split("_")[0] for task in tasks}

        assert not scenes(found["libero/held-out-scenes"]) & scenes(found["libero/train"])


class TestFiles:
    def test_without_the_package_it_says_what_to_install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(MissingDependencyError, match=r"counterflow\[libero\]"):
            module._package()

    def test_without_assets_it_says_how_to_get_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COUNTERFLOW_LIBERO_ASSETS", str(tmp_path))
        with pytest.raises(
            MissingDependencyError, match=r"download_assets_from_huggingface.*COUNTERFLOW_LIBERO_ASSETS"
        ):
            assets_folder()

    def test_assets_are_found_where_they_are_said_to_be(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for folder in ("said", "configured"):
            for part in ("scenes", "articulated_objects"):
                (tmp_path / folder / part).mkdir(parents=True)
        (tmp_path / "config.yaml").write_text(f"assets: {tmp_path / 'configured'}\n")
        monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
        monkeypatch.setattr(module, "_package", lambda: tmp_path / "package")
        monkeypatch.delenv("COUNTERFLOW_LIBERO_ASSETS", raising=False)
        assert assets_folder() == (tmp_path / "configured").resolve()
        monkeypatch.setenv("COUNTERFLOW_LIBERO_ASSETS", str(tmp_path / "said"))
        assert assets_folder() == (tmp_path / "said").resolve()

    def test_initial_states_are_read_and_nothing_else_is_run(self, tmp_path: Path) -> None:
        def write(content: object) -> Path:
            path = tmp_path / "x.pruned_init"
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("archive/data.pkl", pickle.dumps(content, protocol=2))
            return path

        states = np.arange(6.0).reshape(2, 3)
        np.testing.assert_array_equal(read_init_states(write(states)), states)
        with pytest.raises(MissingDependencyError, match="print"):
            read_init_states(write(print))
        with pytest.raises(MissingDependencyError, match="can't be read"):
            read_init_states(tmp_path / "nothing")


@needs_libero
def test_a_task_in_the_simulator() -> None:
    """One environment for all of it: the first in a process takes long to make."""
    env = LiberoEnv(TASK)
    spec, first = env.spec, env.reset(3)
    assert spec.observation_layout is not None
    assert (spec.action_dim, spec.max_episode_steps, spec.task) == (7, 400, "put the black bowl on the plate")
    assert first.observation.shape == (spec.observation_dim,)
    entries = {entry.name: entry.columns for entry in spec.observation_layout.objects}
    assert {"akita black bowl 1", "plate 1", "wooden cabinet 1 top level", "wooden cabinet 1 top region"} <= {*entries}
    bowl = first.observation[list(entries["akita black bowl 1"][:3])]  # type: ignore[arg-type]
    np.testing.assert_allclose(bowl, first.privileged["privileged/akita_black_bowl_1_pos"], atol=1e-5)
    np.testing.assert_allclose(first.observation[:3], first.privileged["proprio/effector_pos"], atol=1e-5)
    assert (first.success, first.reward) == (False, 0.0)

    action = np.array([0.5, 0.2, -0.5, 0.0, 0.0, 0.0, -1.0])
    path = [first.observation, *(env.step(action).observation for _ in range(4))]
    assert path[-1][0] > path[0][0]
    env.reset(8)
    again = [env.reset(3).observation, *(env.step(action).observation for _ in range(4))]
    np.testing.assert_allclose(np.stack(again), np.stack(path), atol=1e-6)
    assert env.reset(4).reward == 0.0
    env.close()
