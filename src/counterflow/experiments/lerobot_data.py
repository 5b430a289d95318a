"""LeRobotDatasets (v3) in and out: recordings as datasets of LeRobot's, and theirs with the noise of every chunk.

What is added to a frame, one row a frame, where D = H * A and padding is left out:

    counterflow.noise        (D,)  the noise from which the frozen policy makes the chunk that is decided on at this frame
    counterflow.chunk        (D,)  that chunk, normalised
    counterflow.features     (F,)  what the policy makes of the frame's observation
    counterflow.noise_valid  (1,)  whether the noise may be learned from: a whole chunk is there, the noise gives it (or comes
                                   near it, as it was recorded), and the episode did not fail where that is known

and `meta/counterflow.json` says which policy, action space and denoising the noises belong to. `counterflow distill` reads such a
dataset like any other, without the policy and without decoding a video.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import COUNT
from counterflow.data import SteeringDataset
from counterflow.envs import describe, env_names
from counterflow.errors import (
    CounterflowError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    MissingDependencyError,
)
from counterflow.experiments.inversion import InversionSettings, described_binding, invert_field
from counterflow.files import write_json
from counterflow.learning.dsbc import DSBCConfig, NoiseExamples
from counterflow.policies import ActionSpec, bind, load
from counterflow.steering import binding_of

FORMAT = "counterflow/lerobot-noises"
FORMAT_VERSION = 1
ABOUT = Path("meta") / "counterflow.json"
NOISE, CHUNK, FEATURES, VALID = (f"counterflow.{name}" for name in ("noise", "chunk", "features", "noise_valid"))
STATE, ACTION = "observation.state", "action"
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Written:
    """What a conversion wrote.

    Attributes:
        path: the dataset's folder.
        episodes: how many.
        frames: how many.
        noises: frames whose noise may be learned from.
    """

    path: Path
    episodes: int
    frames: int
    noises: int


def augment_dataset(
    data: Path | str,
    policy: str,
    out: Path | str,
    *,
    steps: int | None = None,
    tolerance: float = 0.01,
    batch_size: int = 16,
    device: str = "cpu",
    revision: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Copy a LeRobotDataset and add, for every frame, the noise of the chunk that begins there and the policy's features.

    The prefix of each frame is computed once; noises are found by exact inversion of the Euler map (FlowDAgger, arXiv
    2607.08877). Learning from the result needs neither the policy nor the images.

    Args:
        data: the dataset's folder, or a hub id.
        policy: the frozen policy, a hub id or folder of LeRobot's (with or without "lerobot:" before it).
        out: where the new dataset goes.
        steps: K, with which the noises will be denoised; None: the policy's own number.
        tolerance: largest reconstruction error, normalised units, of a noise that may be learned from.
        batch_size: frames at a time.
        device: where to compute.
        revision: of a hub id of data.
        on_progress: called with (frames done, frames in all).

    Raises:
        MissingDependencyError: LeRobot is not installed.
        DatasetError: the dataset can't be read, has noises already, or no episode is as long as a chunk.
        MismatchError: dataset and policy don't fit.
        InvalidInputError: `out` exists, or a number is out of range.
        StorageError: writing failed; nothing was left at `out`.
    """
    COUNT.check("batch_size", batch_size)
    source = open_dataset(data, revision)
    if NOISE in source.features:
        raise DatasetError(f"{data} has noises already. Augment the dataset that it was made from.")
    frozen = load(policy if policy.startswith("lerobot:") else f"lerobot:{policy}", device)
    spec: ActionSpec = frozen.action_spec
    settings = InversionSettings(steps=frozen.steps if steps is None else steps, tolerance=tolerance)
    columns = _columns(source, (ACTION, "episode_index"))
    actions, episodes = columns[ACTION], columns["episode_index"].reshape(-1)
    if actions.ndim != 2 or actions.shape[1] != spec.dim:
        raise MismatchError(
            f"actions of {data} have shape {actions.shape[1:]} and the policy acts in {spec.dim} dimensions. Use a dataset of "
            "the robot that the policy was trained for."
        )
    starts, firsts = _starts(episodes, spec)
    if len(starts) == 0:
        raise DatasetError(
            f"a chunk has {spec.horizon - spec.past} actions and no episode of {data} is as long. Use longer episodes, or a "
            "policy with a shorter horizon."
        )
    size = spec.horizon * spec.dim
    noises, chunks = np.zeros((len(actions), size), np.float32), np.zeros((len(actions), size), np.float32)
    valid = np.zeros((len(actions), 1), bool)
    features: npt.NDArray[np.float32] | None = None
    window = np.arange(spec.horizon) - spec.past
    moments = int(getattr(frozen.policy.config, "n_obs_steps", 1))
    for done in range(0, len(starts), batch_size):
        some = starts[done : done + batch_size]
        with torch.no_grad():
            context = frozen.encode(_observation(source, some, firsts[some], moments))
            wanted = spec.normalise(torch.from_numpy(actions[some[:, None] + window]).float()).to(frozen.device)
            noise, missed = invert_field(bind(frozen, context), wanted, settings)
            made: Tensor = frozen.features(context)
        if features is None:
            features = np.zeros((len(actions), made.shape[1]), np.float32)
        finite = torch.isfinite(noise).flatten(1).all(1)
        noises[some] = torch.where(finite[:, None, None], noise, 0.0)[..., : spec.dim].flatten(1).cpu().numpy()
        chunks[some] = wanted[..., : spec.dim].flatten(1).cpu().numpy()
        features[some] = made.float().cpu().numpy()
        valid[some, 0] = (finite & (missed <= tolerance)).cpu().numpy()
        if on_progress is not None:
            on_progress(min(done + batch_size, len(starts)), len(starts))
    assert features is not None
    added = {NOISE: noises, CHUNK: chunks, FEATURES: features, VALID: valid}
    from lerobot.datasets.dataset_tools import add_features

    with _new_folder(out) as folder:
        described = {name: (values, _feature(values)) for name, values in added.items()}
        add_features(source, described, output_dir=folder, repo_id=f"counterflow/{Path(out).name}")
        _write_about(folder, binding_of(frozen, settings.steps), asdict(settings), str(data))
    return Written(Path(out), len(np.unique(episodes)), len(actions), int(valid.sum()))


def convert_steering(
    path: Path | str,
    out: Path | str,
    *,
    success_only: bool = False,
    fps: int = 20,
    on_progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Write a steering dataset as a LeRobotDataset: a frame a step, with what was seen, done and earned, and the noises.

    A step's noise is the one that was recorded for the actions executed from there; where that is missing, decisions have the
    noise that was used and other steps none. In failed episodes none may be learned from.

    Args:
        path: folder of a steering dataset that was recorded with its steps.
        out: where the new dataset goes.
        success_only: leave failed episodes out.
        fps: steps a second.
        on_progress: called with (episodes done, episodes in all).

    Raises:
        MissingDependencyError: LeRobot is not installed.
        DatasetError: the dataset is damaged, empty, or was recorded without its steps.
        InvalidInputError: `out` exists, or fps is not positive.
        StorageError: writing failed; nothing was left at `out`.
    """
    COUNT.check("fps", fps)
    dataset = SteeringDataset.load(path)
    dataset = dataset.require_successes() if success_only else dataset
    if len(dataset) == 0:
        raise DatasetError(f"{path} holds no episodes. Record some first.")
    for episode in dataset:
        absent = [name for name in ("step_observations", "step_actions", "rewards") if name not in episode.arrays]
        if absent:
            raise DatasetError(
                f"{episode} of {path} was recorded without {', '.join(absent)}. Record it with its steps."
            )
    lerobot_dataset = _lerobot_dataset()
    binding = dataset.binding
    tasks = {env: describe(env).task if env in env_names() else env for env in {one.env for one in dataset}}
    frames = noises = 0
    with _new_folder(out) as folder:
        made: Any = None
        for index, episode in enumerate(dataset):
            rows = _frames(episode.arrays, episode.success, binding)
            if made is None:
                described = {name: _feature(values) for name, values in rows.items()}
                made = lerobot_dataset.create(
                    f"counterflow/{Path(out).name}", fps=fps, features=described, root=folder, use_videos=False
                )
            elif set(rows) != set(described):
                raise DatasetError(
                    f"{episode} of {path} has other arrays than those before; convert them by themselves."
                )
            for step in range(len(rows[ACTION])):
                made.add_frame({name: values[step] for name, values in rows.items()} | {"task": tasks[episode.env]})
            made.save_episode()
            frames, noises = frames + len(rows[ACTION]), noises + int(rows[VALID].sum())
            if on_progress is not None:
                on_progress(index + 1, len(dataset))
        made.finalize()
        _write_about(folder, binding, {}, str(path))
    return Written(Path(out), len(dataset), frames, noises)


def is_augmented(path: Path | str) -> bool:
    """Say whether a folder is a LeRobotDataset with noises."""
    return (Path(path) / ABOUT).is_file()


def lerobot_examples(path: Path | str, config: DSBCConfig, first: int | None = None) -> NoiseExamples:
    """Read what there is to learn from in a LeRobotDataset with noises; no video is decoded and no policy loaded.

    Args:
        path: its folder.
        config: says which inputs and targets are wanted.
        first: use the first so many episodes of those that can be learned from.

    Raises:
        MissingDependencyError: LeRobot is not installed.
        DatasetError: it is damaged, or holds no noise that can be learned from.
        MismatchError: the inputs that were asked for aren't there.
        InvalidInputError: there are fewer episodes.
    """
    binding = read_about(path)
    source = open_dataset(path)
    inputs = FEATURES if config.regressor.inputs == "features" else STATE
    target = NOISE if config.regressor.target == "noise" else CHUNK
    wanted = (inputs, target, VALID, *((CHUNK,) if config.regressor.intention is not None else ()))
    absent = [name for name in wanted if name not in source.features]
    if absent:
        raise MismatchError(
            f"{path} has no {', '.join(absent)}; it has {', '.join(source.features)}. Learn from the others, or augment it anew."
        )
    columns = _columns(source, (*dict.fromkeys(wanted), "episode_index"))
    episodes = columns["episode_index"].reshape(-1).astype(np.int64)
    usable = columns[VALID].reshape(-1).astype(bool)
    if not usable.any():
        raise DatasetError(
            f"no noise of {path} can be learned from: none gives its chunk, or all episodes failed. Raise the tolerance, or "
            "the steps, or record successes."
        )
    learnable = np.unique(episodes[usable])
    if first is not None:
        if not 1 <= first <= len(learnable):
            raise InvalidInputError(
                f"the first {first} episodes were asked for; {path} has {len(learnable)} that can be learned from."
            )
        usable &= np.isin(episodes, learnable[:first])
    targets = columns[target][usable].astype(np.float32)
    return NoiseExamples(
        columns[inputs][usable].astype(np.float32),
        targets.reshape(len(targets), binding.horizon, binding.dim),
        episodes[usable],
        binding,
        None
        if config.regressor.intention is None
        else columns[CHUNK][usable].astype(np.float32).reshape(len(targets), binding.horizon, binding.dim),
    )


def read_about(path: Path | str) -> Binding:
    """Return what the noises of a LeRobotDataset belong to.

    Raises:
        DatasetError: nothing says so, or it can't be read.
    """
    return described_binding(path, Path(path) / ABOUT, FORMAT, FORMAT_VERSION, "counterflow lerobot augment")


def open_dataset(data: Path | str, revision: str | None = None) -> Any:
    """Open a LeRobotDataset, a folder or a hub id.

    Raises:
        MissingDependencyError: LeRobot is not installed.
        DatasetError: it can't be read.
    """
    lerobot_dataset = _lerobot_dataset()
    folder = Path(data)
    try:
        if folder.is_dir():
            return lerobot_dataset(f"local/{folder.name}", root=folder)
        if folder.is_absolute() or str(data).count("/") != 1:
            raise DatasetError(
                f"there is no folder {data}. Give the folder of a LeRobotDataset, or a hub id (owner/name)."
            )
        return lerobot_dataset(str(data), revision=revision)
    except CounterflowError:
        raise
    except Exception as error:  # LeRobot and the hub's client raise whatever they please
        raise DatasetError(
            f"{data} can't be read as a LeRobotDataset: {type(error).__name__}: {error}. Expected version 3.0, with "
            "meta/info.json; LeRobot converts older ones."
        ) from error


def export_policy(base: str, out: Path | str, **settings: Any) -> Path:
    """Write a steered policy for LeRobot's commands; see `lerobot_policy_counterflow.modeling_counterflow.export`.

    Raises:
        MissingDependencyError: the plugin is not installed.
    """
    try:
        from lerobot_policy_counterflow.modeling_counterflow import export
    except ImportError as error:
        raise MissingDependencyError(
            f"exporting to LeRobot needs its plugin ({error}): pip install lerobot_policy_counterflow, or from a clone "
            "pip install -e plugins/lerobot_policy_counterflow"
        ) from error
    written: Path = export(base.removeprefix("lerobot:"), out, **settings)
    return written


def _lerobot_dataset() -> Any:
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset
    except ImportError as error:
        raise MissingDependencyError(
            f"LeRobotDatasets need LeRobot 0.6 on Python 3.12 ({error}): pip install 'lerobot[dataset]'"
        ) from error
    return LeRobotDataset


def _columns(source: Any, names: tuple[str, ...]) -> dict[str, Array]:
    """Return columns of a dataset as arrays, one row a frame, without touching its images."""
    table = source.hf_dataset.select_columns(list(names)).with_format("numpy")
    return {name: np.stack([np.atleast_1d(value) for value in table[name]]) for name in names}


def _starts(episodes: Array, spec: ActionSpec) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the frames at which a whole chunk is decided on, and for every frame the first of its episode."""
    changes = np.flatnonzero(np.diff(episodes)) + 1
    begins, ends = np.concatenate([[0], changes]), np.concatenate([changes, [len(episodes)]])
    firsts = np.repeat(begins, ends - begins).astype(np.int64)
    inside = [
        np.arange(begin + spec.past, end - (spec.horizon - spec.past) + 1)
        for begin, end in zip(begins, ends, strict=True)
    ]
    return np.concatenate(inside).astype(np.int64), firsts


def _observation(source: Any, frames: Array, firsts: Array, moments: int) -> dict[str, Any]:
    """Return the observations at some frames by LeRobot's names: (B, ...), or (B, S, ...) where S moments are seen."""
    rows = [
        [source[int(max(first, frame - back))] for back in reversed(range(moments))]
        for frame, first in zip(frames, firsts, strict=True)
    ]
    names = [name for name in rows[0][0] if name.startswith("observation.")]
    seen: dict[str, Any] = {}
    for name in names:
        stacked = torch.stack([torch.stack([moment[name] for moment in row]) for row in rows])
        seen[name] = stacked if moments > 1 else stacked[:, 0]
    return seen | {"task": [row[-1]["task"] for row in rows]}


def _frames(arrays: Mapping[str, Array], success: bool, binding: Binding) -> dict[str, Array]:
    """Return an episode's steps as the columns of a LeRobotDataset."""
    steps = len(arrays["step_actions"])
    decided = np.cumsum(arrays["executed"]) - arrays["executed"]
    size = binding.horizon * binding.dim
    noise, chunk = np.zeros((steps, size), np.float32), np.zeros((steps, size), np.float32)
    valid, decision = np.zeros((steps, 1), bool), np.zeros((steps, 1), bool)
    decision[decided] = True
    if "step_noise" in arrays:
        noise[:] = arrays["step_noise"][..., : binding.dim].reshape(steps, size)
        chunk[:] = arrays["step_chunks"][..., : binding.dim].reshape(steps, size)
        valid[:, 0] = arrays["step_noise_valid"]
    else:
        noise[decided] = arrays["noise"][..., : binding.dim].reshape(len(decided), size)
        chunk[decided] = arrays["chunks"][..., : binding.dim].reshape(len(decided), size)
        valid[decided, 0] = arrays["start_time"] == 0
    valid &= success
    last = np.zeros((steps, 1), bool)
    last[-1] = True
    rows: dict[str, Array] = {
        STATE: arrays["step_observations"],
        ACTION: arrays["step_actions"],
        "next.reward": arrays["rewards"][:, None].astype(np.float32),
        "next.done": last,
        "next.success": last & success,
        "counterflow.decision": decision,
        "counterflow.intervened": np.repeat(arrays["intervened"], arrays["executed"])[:, None],
        NOISE: noise,
        CHUNK: chunk,
        VALID: valid,
    }
    if "step_features" in arrays:
        rows[FEATURES] = arrays["step_features"]
    elif "features" in arrays:
        rows[FEATURES] = np.repeat(arrays["features"], arrays["executed"], axis=0)  # those of the decision
    return rows


def _feature(values: Array) -> dict[str, Any]:
    """Describe a column as LeRobot does."""
    return {"dtype": str(values.dtype), "shape": tuple(values.shape[1:]), "names": None}


def _write_about(folder: Path, binding: Binding, settings: Mapping[str, Any], source: str) -> None:
    write_json(
        folder / ABOUT,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "binding": binding.to_json(),
            "settings": dict(settings),
            "from": Path(source).name,
        },
    )


@contextmanager
def _new_folder(out: Path | str) -> Iterator[Path]:
    """Yield a folder's temporary place, not made yet; put it in its own when the block succeeds, else leave nothing.

    Raises:
        InvalidInputError: something is there already.
        StorageError: writing failed.
    """
    from counterflow.files import reason_of, storage_error

    out = Path(out)
    if out.exists():
        raise InvalidInputError(f"{out} exists already. Choose another folder, or remove it.")
    scratch = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)
        yield scratch
        scratch.replace(out)
    except OSError as error:
        raise storage_error(out, reason_of(error)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
