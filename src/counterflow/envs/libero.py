"""LIBERO: 130 tasks of a Panda arm in kitchens, living rooms and studies, described in sentences, in five suites.

Source: LIBERO (arXiv 2306.03310), package `hf-libero` with robosuite 1.4.0 (extra `libero`). The tasks have its own names under
their suite's: "libero/90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate". All are one family, "libero". An episode begins in
one of the benchmark's fifty initial states of its task, chosen by the seed, after ten steps in which things settle; it ends
when the task's goal is fulfilled, or after the suite's number of steps (those that policies are evaluated with: spatial 280,
object 280, goal 300, 10 520, 90 400). The reward is -1 for every step that does not reach the goal.

Actions are seven numbers in [-1, 1]: displacements of the gripper along x, y and z (1 is 5 cm), its turn (1 is 0.5 rad) and the
gripper (positive closes). An observation is a state: the robot's eleven numbers (where the hand is, how it is turned, two finger
joints), then ten of everything that the scene names, be it a thing, a part that moves or a place: position, how it is turned, and
how far its joint is moved. A turn is the first two columns of its matrix (arXiv 1812.07035): of the two signs of a quaternion
none is continuous, and a hand that points down is where they meet. Which numbers are whose is in `EnvSpec.observation_layout`.
Pictures come from two cameras, "agentview" and "robot0_eye_in_hand".

A policy that looks is shown what LeRobot's evaluation shows it (lerobot/envs/libero.py and LiberoProcessorStep, 0.6), number for
number as far as the simulator is (`libero_physics`): "observation.images.image" and "observation.images.image2", the two cameras
at 256 x 256, drawn as the benchmark draws and turned by half a turn (so that they stand upright and are mirrored); and
"observation.state", where the hand is, how it is turned (axis times angle) and the two finger joints. That is not quite the
present: robosuite samples its observations a simulation step (2 ms) before a control step is over, and that is what LeRobot's
policies are evaluated on.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from counterflow.envs.libero_physics import Physics, quick_reset
from counterflow.envs.rendering import asked_for, drawing, hurry, prepare_backend, require_backend
from counterflow.envs.types import CameraView, EnvSpec, FloatArray, Image, Moment, Privileged, RenderSettings, Sights
from counterflow.errors import MissingDependencyError, UnknownNameError
from counterflow.layout import ActionLayout, ObjectEntry, ObservationLayout
from counterflow.random import child_seed, global_numpy

FAMILY = "libero"
STEP_LIMITS = {"spatial": 280, "object": 280, "goal": 300, "10": 520, "90": 400}
ACTION_LAYOUT = ActionLayout(translation=(0, 1, 2), rotation=(3, 4, 5), gripper=6, gripper_close_sign=1)
CAMERAS = ("agentview", "robot0_eye_in_hand", "frontview", "birdview", "sideview")
CAMERA = "agentview"
SIGHT = RenderSettings(256, 256, "dataset")
SIGHTS = {"observation.images.image": "agentview", "observation.images.image2": "robot0_eye_in_hand"}
STATE = "observation.state"
ASSETS = "COUNTERFLOW_LIBERO_ASSETS"
SETTLING_STEPS = 10
ROBOT_DIM = 11
OBJECT_DIM = 10
OPENING = 0.04  # metres that a finger moves
TOO_NEW_MUJOCO = (3, 9)
MAX_GEOMS = 1000  # of a scene that is drawn, as robosuite has it
DRAWN = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos", "cam_xmat",
    "light_xpos", "light_xdir",
)  # fmt: skip
"""What a picture depends on, of MuJoCo's data: where everything is."""

ROBOSUITE_LOG = "/tmp/robosuite.log"
HOW_TO_INSTALL_LIBERO = (
    "pip install 'counterflow[libero]', or, without the training code that LIBERO brings along, pip install "
    "'counterflow[libero-simulator]' and then pip install --no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1"
)


@cache
def suites() -> dict[str, tuple[str, ...]]:
    """Return the names of the tasks, without suite, by suite."""
    content = json.loads((Path(__file__).parent / "tasks" / "libero.json").read_text())
    return {suite: tuple(tasks) for suite, tasks in content.items()}


def names() -> list[str]:
    """Return every task by its full name."""
    return [f"{FAMILY}/{suite}/{task}" for suite, tasks in suites().items() for task in tasks]


def groups() -> dict[str, tuple[str, ...]]:
    """Return the suites as groups of tasks: "libero/90" and so on."""
    return {
        f"{FAMILY}/{suite}": tuple(f"{FAMILY}/{suite}/{task}" for task in tasks) for suite, tasks in suites().items()
    }


def sentence_of(task: str) -> str:
    """Return a task's sentence, as LIBERO has it: its name without the scene's."""
    return re.sub(r"^[A-Z_]+SCENE\d+_", "", task).replace("_", " ")


def assets_folder() -> Path:
    """Return the folder with LIBERO's meshes and textures.

    It is looked for where the environment variable COUNTERFLOW_LIBERO_ASSETS says, else where LIBERO's own config.yaml does, else
    inside the package.

    Raises:
        MissingDependencyError: it is in none of these places, or the package is missing.
    """
    places = [Path(os.environ[ASSETS])] if os.environ.get(ASSETS) else [*_configured(), _package() / "assets"]
    for place in places:
        if (place / "scenes").is_dir() and (place / "articulated_objects").is_dir():
            return place.resolve()
    raise MissingDependencyError(
        f"LIBERO's assets (meshes and textures) were not found in {', '.join(map(str, places))}; the package comes without them. "
        "Fetch them with: pip install huggingface_hub && echo n | "  # the import asks about a folder for datasets
        "python -c 'from libero.libero.utils.download_utils import download_assets_from_huggingface as fetch; "
        f"print(fetch())', or take libero/libero/assets of github.com/Lifelong-Robot-Learning/LIBERO; then set {ASSETS} to "
        "that folder."
    )


class LiberoEnv:
    """One LIBERO task, seeded completely, with the state of everything in the scene laid open by name.

    Args:
        name: "libero/<suite>/<task>", one of `names()`.
        render: how to draw frames; None if they will not be asked for.

    Raises:
        UnknownNameError: there is no such task or camera.
        MissingDependencyError: the package or its assets are missing, or MuJoCo is too new for it.
        RenderingError: frames are wanted and this machine can't draw them.
    """

    def __init__(self, name: str, render: RenderSettings | None = None) -> None:
        if name not in names():
            raise UnknownNameError("task of LIBERO's", name, names())
        if render is not None and render.camera not in (None, *CAMERAS):
            raise UnknownNameError(f"camera of {name}", str(render.camera), CAMERAS)
        _, self._suite, self._task = name.split("/")
        self._name, self._render = name, render
        prepare_backend()  # before the first import of mujoco
        if render is not None:
            require_backend()
        make, package = _prepare(), _package()
        files = f"libero_{self._suite}", self._task
        with quick_reset():
            self._env: Any = make(
                bddl_file_name=str(package / "bddl_files" / files[0] / f"{files[1]}.bddl"),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
            ).env
        self._starts = read_init_states(package / "init_files" / files[0] / f"{files[1]}.pruned_init")
        self._renderers: dict[tuple[int, int, str], Any] = {}
        self._seen: Any = None  # MuJoCo's data, with everything where it was when robosuite last sampled observations
        self._steps = 0
        with global_numpy(0), quick_reset():
            self._env.reset()
        self._watch()
        self._entries = _entries(self._env)
        self._boxes = {name: _box(self._env.sim, body) for name, (_, body, _) in self._things().items()}

    @cached_property
    def spec(self) -> EnvSpec:
        """The description."""
        entries = []
        for index, entry in enumerate(self._entries):
            first = ROBOT_DIM + OBJECT_DIM * index
            entries.append(ObjectEntry(in_words(entry), tuple(range(first, first + OBJECT_DIM))))
        return EnvSpec(
            name=self._name,
            family=FAMILY,
            task=sentence_of(self._task),
            observation_dim=ROBOT_DIM + OBJECT_DIM * len(entries),
            action_dim=7,
            action_low=(-1.0,) * 7,
            action_high=(1.0,) * 7,
            action_layout=ACTION_LAYOUT,
            max_episode_steps=STEP_LIMITS[self._suite],
            observation_layout=ObservationLayout(tuple(range(ROBOT_DIM)), tuple(entries)),
            sights={**dict.fromkeys(SIGHTS, (SIGHT.height, SIGHT.width, 3)), STATE: (8,)},
        )

    @property
    def simulator(self) -> Any:
        """LIBERO's own environment, of robosuite's kind."""
        return self._env

    def reset(self, seed: int) -> Moment:
        """Begin the episode that `seed` names, in one of the task's initial states."""
        return self.reset_to(child_seed(seed, "start") % len(self._starts), seed)

    def reset_to(self, start: int, seed: int = 0) -> Moment:
        """Begin in initial state number `start` (0 to 49); where fixtures stand, within a centimetre, descends from `seed`."""
        self._free_renderers()  # a reset makes a new simulator
        self._seen = None
        with global_numpy(child_seed(seed, "places")), quick_reset():
            self._env.reset()
        self._physics = Physics(self._env)
        simulator = self._env.sim
        simulator.set_state_from_flattened(self._starts[start])
        simulator.forward()
        self._env._post_process()
        self._env._update_observables(force=True)  # LIBERO does, and when robosuite samples depends on it
        still = np.array([0.0] * 6 + [-1.0])
        for _ in range(SETTLING_STEPS):
            self._physics.execute(still)
        self._steps = 0
        return self._moment()

    def step(self, action: FloatArray) -> Moment:
        """Execute one action (7,) in [-1, 1].

        Raises:
            InvalidInputError: the action's shape is wrong, or it is not finite, or it is outside [-1, 1].
        """
        self._physics.execute(self.spec.check_action(action))
        self._steps += 1
        return self._moment()

    def render(self) -> Image:
        """Draw the present state: (height, width, 3) uint8."""
        settings = asked_for(self._render, self._name)
        return self._draw(settings, settings.camera or CAMERA, self._env.sim.data._data)

    def look(self, names: Sequence[str]) -> Sights:
        """Show what LeRobot's evaluation would show a policy now, of what is named: see the top of this file.

        Raises:
            RenderingError: a picture is wanted and this machine can't draw.
        """
        shown: Sights = {}
        for name in names:
            if name == STATE:
                shown[name] = self._sampled_state()
            else:
                picture = self._draw(SIGHT, SIGHTS[name], self._seen)
                shown[name] = np.ascontiguousarray(picture[:, ::-1])  # upright already; LeRobot turns both ways
        return shown

    def camera(self) -> CameraView:
        """Describe the camera that `render` draws with."""
        settings = self._render or RenderSettings()
        model, data = self._env.sim.model, self._env.sim.data
        index = model.camera_name2id(settings.camera or CAMERA)
        return CameraView(
            position=np.array(data.cam_xpos[index]),
            rotation=np.array(data.cam_xmat[index]).reshape(3, 3),
            fovy=float(model.cam_fovy[index]),
            width=settings.width,
            height=settings.height,
        )

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self._free_renderers()
        self._env.close()

    def _things(self) -> dict[str, tuple[str, str, str | None]]:
        """Return the entries that are bodies."""
        return {name: entry for name, entry in self._entries.items() if entry[0] == "body"}

    def _draw(self, settings: RenderSettings, camera: str, data: Any) -> Image:
        """Draw MuJoCo's data: (height, width, 3) uint8, the first row at the top."""
        require_backend()
        import mujoco

        key = settings.width, settings.height, settings.quality
        with drawing(self._name):
            if key not in self._renderers:
                self._renderers[key] = _renderer(self._env.sim.model._model, settings)
            option = mujoco.MjvOption()
            option.geomgroup[:2] = 0, 1  # what is seen, not what collides
            self._renderers[key].update_scene(data, camera, option)
            frame: Image = self._renderers[key].render()
        return frame

    def _free_renderers(self) -> None:
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers = {}

    def _watch(self) -> None:
        """Keep where everything is whenever robosuite samples its observations, as its own camera sensors would draw it."""
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        def drawn(_: Any) -> float:
            data = self._env.sim.data._data
            if self._seen is None:
                self._seen = mujoco.MjData(self._env.sim.model._model)
            for name in DRAWN:
                getattr(self._seen, name)[:] = getattr(data, name)
            return 0.0

        watching = sensor(modality="counterflow")(drawn)
        self._env.add_observable(Observable("counterflow", watching, sampling_rate=self._env.control_freq))

    def _sampled_state(self) -> npt.NDArray[np.float32]:
        """Return position, axis times angle and finger joints (8,), by the formula of LeRobot's LiberoProcessorStep."""
        sampled = self._env._observables
        position, quaternion, fingers = (
            np.asarray(sampled[f"robot0_{name}"].obs, np.float32) for name in ("eef_pos", "eef_quat", "gripper_qpos")
        )
        cosine = quaternion[3].clip(-1.0, 1.0)
        sine = np.sqrt((1 - cosine * cosine).clip(0.0))
        turn = np.zeros(3, np.float32) if sine <= 1e-10 else quaternion[:3] / sine * (2 * np.arccos(cosine))
        return np.concatenate([position, turn, fingers]).astype(np.float32)

    def _moment(self) -> Moment:
        success = bool(self._env._check_success())
        told = self._privileged()
        names = ["proprio/effector", *(f"privileged/{name}" for name in self._entries)]
        turns = _columns(np.stack([told[f"{name}_quat"] for name in names]))
        seen = [told["proprio/effector_pos"], turns[0], told["proprio/finger_pos"]]
        for name, turn in zip(names[1:], turns[1:], strict=True):
            seen += [told[f"{name}_pos"], turn, told[f"{name}_joint"]]
        return Moment(
            observation=np.concatenate(seen).astype(np.float32),
            reward=0.0 if success or self._steps == 0 else -1.0,
            success=success,
            terminated=success,
            truncated=not success and self._steps >= STEP_LIMITS[self._suite],
            privileged=told,
        )

    def _privileged(self) -> Privileged:
        """Collect where everything is: metres, world frame; quaternions w x y z with w not negative; joints m or rad."""
        data, robot = self._env.sim.data, self._env.robots[0]
        fingers = np.array(data.qpos[robot._ref_gripper_joint_pos_indexes], dtype=np.float64)
        told: Privileged = {
            "proprio/effector_pos": np.array(data.site_xpos[robot.eef_site_id], dtype=np.float64),
            "proprio/effector_quat": _upright(_quaternion(data.site_xmat[robot.eef_site_id])),
            "proprio/finger_pos": fingers,
            "proprio/gripper_opening": np.array([1.0 - np.abs(fingers).mean() / OPENING]),  # 0 is open, 1 is closed
            "proprio/joint_pos": np.array(data.qpos[robot._ref_joint_pos_indexes], dtype=np.float64),
        }
        for name, (kind, where, joint) in self._entries.items():
            if kind == "site":
                position, turn = data.get_site_xpos(where), _quaternion(data.get_site_xmat(where))
            else:
                position, turn = data.get_body_xpos(where), data.get_body_xquat(where)
            moved = 0.0 if joint is None else float(data.get_joint_qpos(joint))
            told[f"privileged/{name}_pos"] = np.array(position, dtype=np.float64)
            told[f"privileged/{name}_quat"] = _upright(turn)
            told[f"privileged/{name}_joint"] = np.array([moved])
        for name, (low, high) in self._boxes.items():
            told[f"privileged/{name}_low"], told[f"privileged/{name}_high"] = low, high
        return told


def in_words(entry: str) -> str:
    """Return an entry's name as words: "akita_black_bowl_1" is "akita black bowl 1"."""
    return entry.replace("_", " ")


def _entries(env: Any) -> dict[str, tuple[str, str, str | None]]:
    """Name everything in a scene: things and fixtures, then the parts of them that move, then places.

    Returns:
        By name: whether it is a body or a site, what the simulator calls that, and its joint where it has one that tells how far
        it is moved. Regions that only say where things begin are left out.
    """
    found: dict[str, tuple[str, str, str | None]] = {}
    for name, thing in env.objects_dict.items():
        found[name] = ("body", thing.root_body, None)
    parts: dict[str, tuple[str, str, str | None]] = {}
    model = env.sim.model
    for name, thing in env.fixtures_dict.items():
        if name not in env.object_states_dict:
            continue  # the table or floor itself
        found[name] = ("body", thing.root_body, None)
        for joint in thing.joints:
            body = model.body_id2name(model.jnt_bodyid[model.joint_name2id(joint)])
            parts[joint] = ("body", body, joint)
    places = {name: ("site", name, None) for name in env.object_sites_dict if not name.endswith("_init_region")}
    return {**found, **parts, **places}


def _box(simulator: Any, body: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the corners (3,), (3,) of the box around what collides of a body and all that is fixed to it, in its own frame."""
    model, data = simulator.model._model, simulator.data._data
    root = model.body(body).id
    family = {root}
    for index in range(root + 1, model.nbody):
        if model.body_parentid[index] in family and model.body_jntnum[index] == 0:
            family.add(index)
    turn, origin = data.xmat[root].reshape(3, 3), data.xpos[root]
    signs = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)])
    corners = [np.zeros((1, 3))]
    for geom in range(model.ngeom):
        if model.geom_bodyid[geom] in family and model.geom_contype[geom] + model.geom_conaffinity[geom] > 0:
            own = model.geom_aabb[geom, :3] + signs * model.geom_aabb[geom, 3:]
            world = data.geom_xpos[geom] + own @ data.geom_xmat[geom].reshape(3, 3).T
            corners.append((world - origin) @ turn)
    every = np.concatenate(corners[1:] or corners)
    return every.min(axis=0).astype(np.float64), every.max(axis=0).astype(np.float64)


def read_init_states(path: Path) -> npt.NDArray[np.float64]:
    """Read a task's initial states (N, S), flattened simulator states, without torch, with which they were written.

    Raises:
        MissingDependencyError: the file is not there, or not what it should be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            inside = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            states = _NumpyOnly(io.BytesIO(archive.read(inside))).load()
        return np.asarray(states, dtype=np.float64)
    except (OSError, zipfile.BadZipFile, StopIteration, pickle.UnpicklingError, ValueError) as error:
        raise MissingDependencyError(
            f"LIBERO's initial states {path} can't be read: {error}. Install the package again: {HOW_TO_INSTALL_LIBERO}"
        ) from error


class _NumpyOnly(pickle.Unpickler):
    """Reads arrays and nothing else: a pickle may otherwise run anything."""

    def find_class(self, module: str, name: str) -> Any:
        """Allow what a pickled array is made of."""
        allowed = {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
        if (module, name) in allowed or (module.startswith("numpy.") and name == "_reconstruct"):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def _package() -> Path:
    """Return the package's inner folder, without importing it.

    Raises:
        MissingDependencyError: it is not installed.
    """
    found = importlib.util.find_spec("libero")
    for place in (found.submodule_search_locations or ()) if found is not None else ():
        if (Path(place) / "libero" / "bddl_files").is_dir():
            return Path(place) / "libero"
    raise MissingDependencyError(f"LIBERO is not installed. Install it: {HOW_TO_INSTALL_LIBERO}")


def _config_file() -> Path:
    return Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero") / "config.yaml"


def _configured() -> list[Path]:
    """Return where LIBERO's own configuration says that the assets are."""
    import yaml

    try:
        content = yaml.safe_load(_config_file().read_text())
        return [Path(content["assets"])]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []


def _prepare() -> Any:
    """Import LIBERO so that it asks nothing and downloads nothing; return its way to make an environment.

    Raises:
        MissingDependencyError: it or its assets are missing, or MuJoCo is too new.
    """
    package, assets = _package(), assets_folder()
    try:
        import mujoco
    except ImportError as error:
        raise MissingDependencyError(f"LIBERO needs MuJoCo: {error}. Install it: {HOW_TO_INSTALL_LIBERO}") from error
    version = tuple(int(part) for part in mujoco.__version__.split(".")[:2])
    if version >= TOO_NEW_MUJOCO:
        raise MissingDependencyError(
            f"LIBERO (robosuite 1.4.0) does not run with MuJoCo {mujoco.__version__}; expected a version from 3.0 to 3.8: pip "
            "install mujoco==3.3.0"
        )
    if not _config_file().exists():
        # Without a configuration the import asks for one on standard input.
        folder = Path(tempfile.mkdtemp(prefix="counterflow-libero-"))
        places = {
            "benchmark_root": package,
            "bddl_files": package / "bddl_files",
            "init_states": package / "init_files",
            "datasets": package.parent / "datasets",
            "assets": assets,
        }
        (folder / "config.yaml").write_text("".join(f"{key}: {json.dumps(str(at))}\n" for key, at in places.items()))
        os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    try:
        import libero.libero as inner

        inner._assets_path_cache = str(assets)  # where it would otherwise begin to download
        from libero.libero.envs.env_wrapper import ControlEnv
    except ImportError as error:
        raise MissingDependencyError(
            f"LIBERO can't be imported: {error}. Install it: {HOW_TO_INSTALL_LIBERO}"
        ) from error
    except OSError as error:  # robosuite opens a log in the folder for temporary files, which may be another user's
        raise MissingDependencyError(
            f"LIBERO can't be imported: {error}. robosuite writes a log to {ROBOSUITE_LOG}; if another user owns that file, ask "
            "them to remove it."
        ) from error
    return ControlEnv


def _renderer(model: Any, settings: RenderSettings) -> Any:
    """Make MuJoCo's renderer with the quality that was asked for."""
    import mujoco

    quality, size = model.vis.quality, model.vis.global_
    size.offwidth, size.offheight = max(size.offwidth, settings.width), max(size.offheight, settings.height)
    own = quality.shadowsize, quality.offsamples
    hurry(model, settings)
    try:
        return mujoco.Renderer(model, settings.height, settings.width, max_geom=MAX_GEOMS)
    finally:
        quality.shadowsize, quality.offsamples = own


def _quaternion(matrix: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """Turn a rotation matrix (3, 3) into a quaternion w x y z."""
    import mujoco

    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.asarray(matrix, dtype=np.float64).reshape(9))
    return quaternion


def _upright(quaternion: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Return the one of a quaternion's two signs whose first number is not negative."""
    told = np.array(quaternion, dtype=np.float64)
    return -told if told[0] < 0 else told


def _columns(quaternions: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the first two columns (K, 6) of the matrices of quaternions w x y z (K, 4)."""
    w, x, y, z = quaternions.T
    first = 1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)
    second = 2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)
    return np.stack([*first, *second], axis=1)
