"""LIBERO: names, splits and files anywhere; the simulator where its package and assets are."""

from __future__ import annotations

import importlib.util
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from counterflow.envs import RenderSettings, env_names, expand_tasks, family_of, groups, make_env
from counterflow.envs import libero as module
from counterflow.envs.libero import LiberoEnv, assets_folder, names, read_init_states, sentence_of, suites
from counterflow.errors import MissingDependencyError, UnknownNameError
from counterflow.random import child_seed

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


@needs_libero
def test_steps_and_resets_are_robosuites_own_up_to_the_solvers_tolerance(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same path in free motion and in contact, with the fixtures of two seeds, and the simulator's own step beside it."""
    ours, theirs = LiberoEnv(TASK), LiberoEnv(TASK)
    rng = np.random.default_rng(0)
    for seed in (3, 8):
        ours.reset(seed)
        with monkeypatch.context() as patched:  # compiled anew
            patched.setattr(module, "quick_reset", nullcontext)
            theirs.reset(seed)
        for _ in range(30):
            action = np.append(rng.uniform(-1, 1, 6), rng.choice([-1.0, 1.0]))
            ours.step(action)
            theirs.simulator.step(action)
            one, other = (env.simulator.sim.get_state().flatten() for env in (ours, theirs))
            np.testing.assert_allclose(one, other, atol=1e-9)
            assert (ours.simulator.timestep, ours.simulator.done) == (theirs.simulator.timestep, theirs.simulator.done)
            np.testing.assert_allclose(
                ours.simulator._observables["robot0_eef_pos"].obs,
                theirs.simulator._observables["robot0_eef_pos"].obs,
                atol=1e-9,
            )
    ours.close()
    theirs.close()


@pytest.fixture(scope="module")
def env() -> Iterator[LiberoEnv]:
    """One environment for every look at it: the first in a process takes long to make."""
    if MISSING:
        pytest.skip(MISSING)
    made = LiberoEnv(TASK)
    yield made
    made.close()


DOWN = np.array([0.4, -0.5, -0.6, 0.2, -0.3, 0.5, -1.0])
SIGHTS = ["observation.images.image", "observation.images.image2", "observation.state"]


@needs_libero
def test_a_turn_is_two_columns_of_its_matrix_and_does_not_jump(env: LiberoEnv) -> None:
    """A hand that points down has a quaternion with w about 0, whose sign is anyone's."""
    moment = env.reset(3)
    hand = env.simulator.sim.data._data.site_xmat[env.simulator.robots[0].eef_site_id].reshape(3, 3)
    np.testing.assert_allclose(moment.observation[3:9], hand[:, :2].T.reshape(-1), atol=1e-6)
    columns, quaternions = [moment.observation[3:9]], [moment.privileged["proprio/effector_quat"]]
    for turn in (-0.3, 0.3):
        for _ in range(10):
            moment = env.step(np.array([0.0, 0.0, 0.0, turn, 0.0, 0.0, -1.0]))
            columns.append(moment.observation[3:9])
            quaternions.append(moment.privileged["proprio/effector_quat"])
    assert np.abs(np.diff(columns, axis=0)).max() < 0.2
    assert np.abs(np.diff(quaternions, axis=0)).max() > 1  # as those of the reasoners do


class TestLook:
    def test_it_is_what_libero_shows_lerobot_to_the_last_bit(self, env: LiberoEnv) -> None:
        """LIBERO's own environment with cameras, read as LeRobot 0.6 does (tests/lerobot has LeRobot itself)."""
        from libero.libero.envs import OffScreenRenderEnv

        path = Path(str(module._package())) / "bddl_files" / "libero_90" / f"{TASK.split('/')[-1]}.bddl"
        theirs = OffScreenRenderEnv(bddl_file_name=str(path), camera_heights=256, camera_widths=256, control_freq=20)
        try:
            theirs.seed(child_seed(7, "places"))
            theirs.reset()
            raw = theirs.set_init_state(env._starts[4])
            for _ in range(10):
                raw, *_ = theirs.step([0.0] * 6 + [-1.0])
            env.reset_to(4, 7)
            for steps in (0, 1, 5):
                for _ in range(steps):
                    env.step(DOWN)
                    raw, *_ = theirs.step(DOWN)
                seen = env.look(SIGHTS)
                for name, camera in zip(SIGHTS, ("agentview", "robot0_eye_in_hand"), strict=False):
                    np.testing.assert_array_equal(seen[name], raw[f"{camera}_image"][::-1, ::-1])
                w = np.float32(raw["robot0_eef_quat"])[3]
                sine = np.sqrt(1 - w * w)
                turn = np.float32(raw["robot0_eef_quat"])[:3] / sine * 2 * np.arccos(w)
                expected = np.concatenate([raw["robot0_eef_pos"], turn, raw["robot0_gripper_qpos"]])
                np.testing.assert_allclose(seen["observation.state"], expected, rtol=3e-7, atol=1e-7)
        finally:
            theirs.close()

    def test_two_cameras_follow_the_arm_upright_and_mirrored(self, env: LiberoEnv) -> None:
        env.reset(3)
        first = env.look(SIGHTS)
        assert {name: (one.shape, str(one.dtype)) for name, one in first.items()} == {
            **dict.fromkeys(SIGHTS[:2], ((256, 256, 3), "uint8")),
            "observation.state": ((8,), "float32"),
        }
        assert {name: one.shape for name, one in first.items()} == env.spec.sights
        front, wrist = (first[name].astype(int) for name in SIGHTS[:2])
        assert np.abs(front - wrist).mean() > 10
        for _ in range(8):
            moment = env.step(DOWN)
        then = env.look(SIGHTS)
        for name in SIGHTS[:2]:
            assert np.abs(then[name].astype(int) - first[name]).mean() > 1
        np.testing.assert_allclose(then["observation.state"][:3], moment.observation[:3], atol=2e-3)
        # What `render` shows upright and as the camera has it is the same from left to right.
        env._render = RenderSettings(256, 256, "dataset")
        drawn, seen = env.render().astype(int), then[SIGHTS[0]].astype(int)
        env._render = None
        assert np.abs(drawn[:, ::-1] - seen).mean() < 1
        assert min(np.abs(other - seen).mean() for other in (drawn, drawn[::-1], drawn[::-1, ::-1])) > 5

    def test_looking_changes_nothing_and_draws_what_is_named(self, env: LiberoEnv) -> None:
        def path(names: list[str]) -> list[np.ndarray]:
            env.reset(5)
            found = []
            for _ in range(3):
                env.look(names)
                found.append(env.step(DOWN).observation)
            return found

        np.testing.assert_array_equal(path(SIGHTS), path([]))
        env.reset(5)
        env.look(["observation.state"])
        assert not env._renderers

    def test_rows_belong_to_their_environments_also_in_workers(self, env: LiberoEnv) -> None:
        with make_env(TASK, 2, workers=2) as several:
            several.reset([1, 2])
            several.execute(np.tile(DOWN, (2, 3, 1)), rows=[1])
            shown = several.look(SIGHTS, [1, 0])
        for position, (seed, steps) in enumerate([(2, 3), (1, 0)]):
            env.reset(seed)
            for _ in range(steps):
                env.step(DOWN)
            for name, one in env.look(SIGHTS).items():
                np.testing.assert_array_equal(shown[name][position], one)
