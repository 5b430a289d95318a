"""LeRobot's flow policies as base policies: SmolVLA, pi0, pi0.5, EVO-1 and the multi-task DiT with its flow objective.

    policy = counterflow.load("lerobot:lerobot/smolvla_base")  # a hub id, or a folder of LeRobot's save_pretrained
    plan = counterflow.steer(policy, "frs").act(observation, reference)

`encode` runs the policy's own preprocessor and its prefix once; `velocity` is one of its denoising steps; `denormalise` does
what its postprocessor does. So a `SteeredPolicy` without steering, with as many steps as the policy itself takes, returns what
its `predict_action_chunk` returns for the same noise. Where each policy keeps these things is in `lerobot_flows`.

An observation is a dictionary with LeRobot's names: images (B, 3, H, W) float in [0, 1], "observation.state" (B, D), and "task",
a sentence or one a row. LeRobot 0.6 needs Python 3.12.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from counterflow.errors import (
    CheckpointError,
    CounterflowError,
    InvalidInputError,
    MismatchError,
    MissingDependencyError,
    StorageError,
)
from counterflow.files import write_json
from counterflow.flow.field import inspectable
from counterflow.layout import ActionLayout
from counterflow.policies.base import ActionSpec, as_device
from counterflow.policies.described import fingerprint
from counterflow.policies.lerobot_flows import FLOWS, NOT_FLOWS, STATE, Prefix
from counterflow.policies.normalisation import NormalisationKind, Normaliser
from counterflow.policies.observation import ObservationEntry

WEIGHTS = "model.safetensors"
MODES: dict[str, tuple[NormalisationKind, tuple[str, str]]] = {
    "MEAN_STD": ("mean_std", ("mean", "std")),
    "MIN_MAX": ("min_max", ("min", "max")),
    "QUANTILES": ("quantile", ("q01", "q99")),
    "QUANTILE10": ("quantile", ("q10", "q90")),
}
IDENTITY = "IDENTITY"
# A dimension that never moved in the data has no scale of its own; LeRobot then divides by 1e-8, in which float32 drowns.
SMALLEST_SCALE = 1e-6
TOLERANCE = 1e-4
LARGE_WEIGHTS = 64 * 2**20  # bytes; from here on a fingerprint is remembered
# What a config says about training, files and machines: it changes no action, or is said elsewhere.
NOT_THE_POLICY = (
    "chunk_execution", "compile_mode", "compile_model", "device", "drop_n_last_frames", "freeze_vision_encoder",
    "gradient_checkpointing", "license", "load_vlm_weights", "n_action_steps", "num_inference_steps",
    "num_inference_timesteps", "num_integration_steps", "num_steps", "optimizer_", "pretrained_path",
    "pretrained_revision", "private", "push_to_hub", "repo_id", "rtc_config", "scheduler_", "tags",
    "text_encoder_name", "train_", "use_amp", "use_peft", "vision_encoder_name", "vlm_model_name",
)  # fmt: skip


class LeRobotPolicy:
    """One of LeRobot's flow policies with its processors, frozen.

    Args:
        policy: the policy; it is put into evaluation mode and its parameters need no gradient from now on.
        preprocessor: LeRobot's pipeline from an observation to the policy's input.
        postprocessor: LeRobot's pipeline from the policy's actions to the robot's.
        layout: which dimension of an action does what; None: unknown.
        low, high: (A,) limits of the actions, robot units; None: unlimited, as in LeRobot.
        task: what to do, for observations that don't say.
        blank_cameras: cameras that may be missing; the policy then sees nothing there (LeRobot's own way with pi0 and pi0.5,
            for robots with fewer cameras than it was trained with).

    Raises:
        MismatchError: it is no flow policy, or one that can't be steered; the message says why.
        CheckpointError: the processors don't fit, or lack the statistics to undo the normalisation of actions.
    """

    def __init__(
        self,
        policy: Any,
        preprocessor: Any,
        postprocessor: Any,
        *,
        layout: ActionLayout | None = None,
        low: tuple[float, ...] | None = None,
        high: tuple[float, ...] | None = None,
        task: str | None = None,
        blank_cameras: tuple[str, ...] = (),
    ) -> None:
        config = policy.config
        self.kind = str(config.type)
        check_config({name: getattr(config, name, None) for name in _CHECKED} | {"type": self.kind}, "this policy")
        policy.eval().requires_grad_(False)
        self.policy, self.preprocessor, self.postprocessor = policy, preprocessor, postprocessor
        self.task, self.blank_cameras = task, tuple(blank_cameras)
        kind = FLOWS[self.kind]
        self._flow = kind(policy)
        self._step = self._flow.velocity
        self.steps = int(getattr(config, kind.steps))
        """K, the denoising steps that the policy itself takes."""
        self.solver = str(getattr(config, "integration_method", "euler"))
        """How it takes them."""
        dim = _action_dim(config)
        width = int(getattr(config, "max_action_dim", dim))
        normaliser = _normaliser(postprocessor, dim)
        self.action_spec = ActionSpec(
            horizon=int(config.horizon if self.kind == "multi_task_dit" else config.chunk_size),
            dim=dim,
            low=low,
            high=high,
            normaliser=normaliser,
            layout=layout,
            padding=width - dim,
            past=int(config.n_obs_steps) - 1 if self.kind == "multi_task_dit" else 0,
            executed=int(config.n_action_steps),
            prior=kind.prior,
        )
        _check_postprocessor(postprocessor, self.action_spec, width if self.kind == "evo1" else dim)
        self._source: Path | None = None
        self._fingerprint: str | None = None
        self.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = next(self.policy.parameters()).device
        return device

    def to(self, device: torch.device | str) -> LeRobotPolicy:
        """Move the policy, and what its preprocessor gives it, to a device; return self."""
        self.policy.to(device)
        self.policy.config.device = str(device)
        for step in self.preprocessor.steps:  # the postprocessor's brings actions back to the CPU
            if type(step).__name__ == "DeviceProcessorStep":
                step.device, step.tensor_device = str(device), torch.device(device)
        return self

    @property
    def family(self) -> str:
        """What kind of policy it is, for example "lerobot/smolvla"."""
        return f"lerobot/{self.kind}"

    @property
    def cameras(self) -> tuple[str, ...]:
        """The cameras that it looks through and can't do without, by LeRobot's names."""
        names = (self._given_name(name) for name in self.policy.config.image_features if "empty_camera" not in name)
        return tuple(name for name in names if name not in self.blank_cameras)

    @property
    def observation_entries(self) -> dict[str, ObservationEntry]:
        """What it sees, by LeRobot's names, without the batch dimension."""
        images = self.policy.config.image_features
        found = {"task": ObservationEntry("text", optional=self.task is not None)}
        for name, feature in self.policy.config.input_features.items():
            given = self._given_name(name)
            if name in images:
                missing = "empty_camera" in name or given in self.blank_cameras
                found[given] = ObservationEntry("image", (int(feature.shape[0]), None, None), missing)
            else:
                found[given] = ObservationEntry("float32", (int(feature.shape[0]),))
        return found

    @property
    def observation_dim(self) -> int | None:
        """How many numbers it sees, where it sees a state and nothing else; None for a policy with cameras."""
        inputs = dict(self.policy.config.input_features)
        if set(inputs) != {STATE}:
            return None
        return int(inputs[STATE].shape[0])

    @torch.no_grad()
    def encode(self, observation: Mapping[str, Any] | Tensor | npt.NDArray[Any]) -> Prefix:
        """Preprocess observations and compute the prefix, on the policy's device.

        Args:
            observation: by LeRobot's names, with a leading dimension B (see the top of this file); for a policy that sees a
                state and nothing else also the states (B, D) themselves. A policy that sees S observations at a time takes
                (B, S, ...); of a single one it is told that nothing has changed before.

        Raises:
            MismatchError: a camera, the state or the task is missing, or has another size than the policy was made for.
            InvalidInputError: an image has the wrong layout, type or range, or a state is not finite.
        """
        batch = self._checked(observation)
        try:
            processed = self.preprocessor(batch)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:
            raise MismatchError(
                f"the preprocessor of this {self.kind} policy can't use the observation: {type(error).__name__}: {error}. It was "
                f"given {', '.join(sorted(batch))}."
            ) from error
        return self._flow.prefix(processed)

    def velocity(self, context: Prefix, x: Tensor, t: Tensor) -> Tensor:
        """Return the velocity (B, H, A + padding) at state x, normalised, and time t (B,); t = 0 is noise.

        Differentiable in x, and safe to call from several threads or for several contexts by turns.

        Raises:
            MismatchError: x is not shaped like the flow's state.
        """
        spec = self.action_spec
        if x.ndim != 3 or x.shape[1:] != (spec.horizon, spec.state_dim):
            raise MismatchError(
                f"the state has shape {tuple(x.shape)}; this {self.kind} policy moves (B, {spec.horizon}, {spec.state_dim}): "
                f"{spec.dim} dimensions of actions and {spec.padding} of padding."
            )
        return self._step(context, x, t)

    def compile(self, **options: Any) -> LeRobotPolicy:
        """Compile a denoising step (`torch.compile`, to which the options go); return self.

        The prefix stays as it is. The first step of every batch size is slow, half a minute or more; it pays on a robot and in
        an evaluation, not for a handful of chunks.
        """
        self._step = torch.compile(self._flow.velocity, **options)
        return self

    def features(self, context: Prefix) -> Tensor:
        """Return what small networks may learn from (B, F): the pooled prefix, with the normalised state."""
        return context.features

    def description(self) -> dict[str, Any]:
        """Return everything but the numbers, as plain values: architecture, action space, conventions, normalisation."""
        spec = self.action_spec
        config = {
            name: value
            for name, value in sorted(_plain(vars(self.policy.config)).items())
            if not name.startswith(("_", *NOT_THE_POLICY))
        }
        return {
            "family": self.family,
            "convention": FLOWS[self.kind].convention,
            "action": {
                "horizon": spec.horizon,
                "dim": spec.dim,
                "padding": spec.padding,
                "past": spec.past,
                "prior": spec.prior,
                "normalisation": "none" if spec.normaliser is None else spec.normaliser.kind,
            },
            "blank_cameras": list(self.blank_cameras),
            "config": config,
        }

    @property
    def fingerprint(self) -> str:
        """A short name for exactly this policy: weights, configuration, conventions and the processors' statistics.

        Computed once. That of a large folder is remembered (in `$XDG_CACHE_HOME/counterflow`), by its files' names, sizes and
        times, for the next process.
        """
        if self._fingerprint is None:
            description = self.description()
            remembered = None if self._source is None else _remembered(self._source, description)
            if remembered is not None and remembered.is_file():
                with contextlib.suppress(OSError, ValueError, KeyError):
                    self._fingerprint = str(json.loads(remembered.read_text())["fingerprint"])
            if self._fingerprint is None:
                self._fingerprint = fingerprint(description, self._tensors())
                if remembered is not None:
                    with contextlib.suppress(StorageError):  # it is only computed again
                        write_json(remembered, {"fingerprint": self._fingerprint})
        return self._fingerprint

    def for_environment(
        self,
        layout: ActionLayout | None,
        low: tuple[float, ...] | None,
        high: tuple[float, ...] | None,
        task: str | None,
    ) -> LeRobotPolicy:
        """Return this policy, its weights shared, with an environment's layout, limits and task where they weren't given.

        They belong to the environment, not to the policy, so the fingerprint does not depend on them. An environment with
        actions of another size is left for `check_fit` to refuse.
        """
        spec, fitted = self.action_spec, copy.copy(self)
        fitted.task = task if self.task is None else self.task
        if low is not None and len(low) == spec.dim:
            fitted.action_spec = replace(
                spec,
                layout=layout if spec.layout is None else spec.layout,
                low=low if spec.low is None else spec.low,
                high=high if spec.high is None else spec.high,
            )
        return fitted

    def _tensors(self) -> dict[str, Tensor]:
        """Return every number that makes the policy what it is, by name, on the CPU."""
        found = {f"policy.{name}": value for name, value in self.policy.state_dict().items()}
        for place, pipeline in (("preprocessor", self.preprocessor), ("postprocessor", self.postprocessor)):
            for index, step in enumerate(pipeline.steps):
                found |= {f"{place}.{index}.{name}": value for name, value in step.state_dict().items()}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}

    def _given_name(self, name: str) -> str:
        """Return what the preprocessor expects a feature to be called, before it renames it."""
        for step in self.preprocessor.steps:
            for given, renamed in getattr(step, "rename_map", {}).items():
                if renamed == name:
                    return str(given)
        return name

    def _checked(self, observation: Any) -> dict[str, Any]:
        """Return the observation as a dictionary of tensors and sentences, checked."""
        if not isinstance(observation, Mapping):
            size = self.observation_dim
            if size is None:
                raise MismatchError(
                    f"the observation is a {type(observation).__name__}; this {self.kind} policy sees "
                    f"{', '.join(self.policy.config.input_features)} and takes a dictionary with these names (and 'task')."
                )
            observation = {STATE: torch.as_tensor(observation)}
        batch = {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in observation.items()}
        rows: dict[str, int] = {}
        for name, feature in self.policy.config.input_features.items():
            given = self._given_name(name)
            if given not in batch:
                self._require(name, given, batch)
                continue
            value = batch[given]
            if not isinstance(value, Tensor):
                raise InvalidInputError(f"{given} is a {type(value).__name__}; expected a torch tensor or numpy array.")
            visual = name in self.policy.config.image_features
            value = _check_image(given, value, feature.shape) if visual else _check_state(given, value, feature.shape)
            batch[given] = self._with_history(value, 4 if visual else 2)
            rows[given] = len(value)
        if len(set(rows.values())) > 1:
            listing = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise MismatchError(f"the observation has this many rows: {listing}. Expected the same for all.")
        count = next(iter(rows.values()))
        task = batch.get("task", self.task)
        if task is None:
            raise MismatchError(
                "the observation does not say what to do. Give it a 'task', a sentence or one a row, or load the policy with "
                "one: load_lerobot(..., task='put the cup on the plate')."
            )
        batch["task"] = [task] * count if isinstance(task, str) else list(task)
        if len(batch["task"]) != count:
            raise MismatchError(
                f"the observation has {count} rows and {len(batch['task'])} tasks; expected one a row, or a single sentence."
            )
        return batch

    def _require(self, name: str, given: str, batch: Mapping[str, Any]) -> None:
        """Raise unless a feature may be missing."""
        if name not in self.policy.config.image_features:
            raise MismatchError(
                f"the observation has no {given}, which this {self.kind} policy sees; it has {', '.join(sorted(batch))}."
            )
        if "empty_camera" not in name and given not in self.blank_cameras:
            there = sorted(other for other in batch if "image" in other)
            raise MismatchError(
                f"the observation has no camera {given}; it has {', '.join(there) or 'none'}. This {self.kind} policy looks "
                f"through {', '.join(self.cameras)}. Give it, rename yours, or, where the policy was trained to do without, "
                f"load it with blank_cameras=({given!r},)."
            )

    def _with_history(self, value: Tensor, ndim: int) -> Tensor:
        """Return (B, S, ...) for a policy that sees S observations at a time: as if nothing had changed before."""
        seen = int(self.policy.config.n_obs_steps)
        if self.kind != "multi_task_dit":
            return value
        if value.ndim == ndim:
            return value[:, None].expand(-1, seen, *value.shape[1:])
        if value.shape[1] != seen:
            raise MismatchError(
                f"an observation shows {value.shape[1]} moments; this policy sees {seen} at a time, the newest last."
            )
        return value


_CHECKED = ("objective", "use_relative_actions", "adapt_to_pi_aloha", "use_peft")


def check_config(config: Mapping[str, Any], what: str) -> None:
    """Refuse what can't be steered, by the config alone: before gigabytes of weights are read.

    Raises:
        MismatchError: it is no flow policy, or one that can't be steered; the message says why.
        CheckpointError: an unknown normalisation mode.
    """
    kind = str(config.get("type"))
    known = f"Steer one of {', '.join(FLOWS)} (multi_task_dit with objective 'flow_matching')."
    if kind in NOT_FLOWS:
        raise MismatchError(f"{what} is of type {kind!r}, which can't be steered: {NOT_FLOWS[kind]}. {known}")
    if kind not in FLOWS:
        raise MismatchError(f"{what} is of type {kind!r}, which this adapter doesn't know. {known}")
    if kind == "multi_task_dit" and config.get("objective") != "flow_matching":
        raise MismatchError(
            f"{what} was trained with objective {config.get('objective')!r}: its network predicts the noise (or the sample) of a "
            f"diffusion schedule, which is no velocity. {known}"
        )
    if config.get("use_relative_actions"):
        raise MismatchError(
            f"{what} predicts actions relative to the state it sees (use_relative_actions), so the same normalised chunk means "
            "something else at every observation, and references and noises would, too. Train it on absolute actions."
        )
    if config.get("adapt_to_pi_aloha"):
        raise MismatchError(
            f"{what} converts joints and grippers by formulas of its own after denoising (adapt_to_pi_aloha), which no "
            "normalisation undoes. Convert the dataset instead, and train without it."
        )
    if config.get("use_peft"):
        raise MismatchError(
            f"{what} is an adapter to another policy's weights (use_peft). Merge the two and save the result."
        )
    for feature, mode in (config.get("normalization_mapping") or {}).items():
        if str(mode) not in (*MODES, IDENTITY):
            raise CheckpointError(
                f"{what} normalises {feature} by the unknown mode {str(mode)!r}; known: {', '.join(MODES)}, {IDENTITY}. It was "
                "changed by hand, or written by a newer LeRobot than 0.6."
            )


def load_lerobot(
    repo_or_path: Path | str,
    device: torch.device | str = "cpu",
    *,
    revision: str | None = None,
    layout: ActionLayout | None = None,
    low: tuple[float, ...] | None = None,
    high: tuple[float, ...] | None = None,
    task: str | None = None,
    blank_cameras: tuple[str, ...] = (),
) -> LeRobotPolicy:
    """Load one of LeRobot's flow policies from a hub id, or from a folder of its `save_pretrained`.

    Args:
        repo_or_path: for example "lerobot/smolvla_base", or a folder with config.json, model.safetensors and both processors.
        device: where it is to compute.
        revision: of a hub id, a commit, branch or tag.
        layout, low, high, task, blank_cameras: as for `LeRobotPolicy`.

    Raises:
        MissingDependencyError: LeRobot 0.6, or what the policy needs of it, is not installed.
        MismatchError: it is no flow policy, or one that can't be steered; the message says why.
        CheckpointError: it can't be found, is damaged or incomplete, or has no processors.
        InvalidInputError: the device can't be used here.
    """
    _require_lerobot()
    device = as_device(device)
    place = str(repo_or_path)
    config_file = _fetch(place, "config.json", revision)
    try:
        content = json.loads(config_file.read_text())
        if not isinstance(content, dict):
            raise TypeError("expected a dictionary")
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{config_file} can't be read: {error}. Fetch or train it again.") from error
    check_config(content, place)
    for name in ("policy_preprocessor.json", "policy_postprocessor.json"):
        _fetch(place, name, revision)
    weights = _fetch(place, WEIGHTS, revision)

    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    folder = str(config_file.parent)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # LeRobot's models print while they load
            config = PreTrainedConfig.from_pretrained(folder)
            config.device = str(device)
            policy = get_policy_class(config.type).from_pretrained(folder, config=config, strict=False)
        _check_weights(policy, weights)
        preprocessor, postprocessor = make_pre_post_processors(
            config,
            pretrained_path=folder if Path(place).is_dir() else place,
            pretrained_revision=revision,
            preprocessor_overrides={"device_processor": {"device": str(device)}},
        )
    except CounterflowError:
        raise
    except ImportError as error:
        raise MissingDependencyError(
            f"LeRobot's {content['type']} needs a package that is missing: {error}. Install it: pip install "
            f"'lerobot[{_EXTRAS.get(str(content['type']), 'all')}]'"
        ) from error
    except Exception as error:  # LeRobot and transformers raise whatever they please
        raise CheckpointError(
            f"LeRobot can't load {place}: {type(error).__name__}: {error}. Check that it opens with LeRobot 0.6 itself."
        ) from error
    found = LeRobotPolicy(
        policy,
        preprocessor,
        postprocessor,
        layout=layout,
        low=low,
        high=high,
        task=task,
        blank_cameras=blank_cameras,
    )
    found._source = Path(folder)
    return found


_EXTRAS = {"smolvla": "smolvla", "pi0": "pi", "pi05": "pi", "multi_task_dit": "multi-task-dit", "evo1": "evo1"}


def _require_lerobot() -> None:
    """Raise `MissingDependencyError` unless LeRobot 0.6 is here."""
    try:
        import lerobot
    except ImportError as error:
        raise MissingDependencyError(
            "LeRobot is not installed here. It needs Python 3.12 and an environment of its own: pip install "
            "'counterflow[lerobot]' 'lerobot[smolvla,pi,multi-task-dit]'"
        ) from error
    version = str(getattr(lerobot, "__version__", "0.0"))
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 6):
        raise MissingDependencyError(
            f"LeRobot {version} is installed; this adapter reads 0.6: pip install 'lerobot>=0.6'"
        )


def _fetch(place: str, name: str, revision: str | None) -> Path:
    """Return where a file of a policy lies, after fetching it from the hub if need be.

    Raises:
        CheckpointError: it isn't there.
    """
    if Path(place).is_dir():
        found = Path(place) / name
        if not found.is_file():
            there = ", ".join(sorted(path.name for path in Path(place).iterdir())[:8]) or "nothing"
            old = " Policies from before LeRobot 0.4 have no processors; LeRobot's migration script makes them."
            raise CheckpointError(
                f"the folder {place} has no {name}; it has {there}. Expected what LeRobot's save_pretrained leaves, of the "
                f"policy and of both its processors.{old if 'processor' in name else ''}"
            )
        return found
    if Path(place).is_absolute() or place.startswith(".") or place.count("/") != 1:
        raise CheckpointError(
            f"there is no folder {place}. Give the folder of a LeRobot policy, or a hub id (owner/name)."
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(place, name, revision=revision))
    except Exception as error:  # the hub's client has a dozen kinds of its own
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise CheckpointError(
            f"{place} is no folder, and {name} can't be fetched from the hub: {type(error).__name__}: {first} Check the name, "
            "the network, and whether the repository wants you to log in (hf auth login)."
        ) from error


def _check_weights(policy: Any, file: Path) -> None:
    """Check that the weights in a file are those of the policy now: some of LeRobot's loaders only print that they failed.

    Raises:
        CheckpointError: the file is damaged, or tensors are missing or differ.
    """
    state = policy.state_dict()
    missing = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    differing = []
    loaded = set()
    try:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dictionary
                own = name if name in state else f"model.{name}"
                if own not in state:
                    continue
                missing.pop(own, None)
                loaded.add(state[own].data_ptr())
                part = stored.get_slice(name)
                if list(part.get_shape()) != list(state[own].shape):
                    differing.append(own)
                    continue
                first = (part[:1] if part.get_shape() else stored.get_tensor(name)).to(state[own])
                if not torch.equal(first, state[own][:1] if state[own].ndim else state[own]):
                    differing.append(own)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated, damaged, or not a safetensors file: {error}. Fetch or train "
            "it again."
        ) from error
    # Tensors that are one and the same are stored once.
    absent = [name for name, value in missing.items() if value.numel() and value.data_ptr() not in loaded]
    if absent or differing:
        named = (absent or differing)[0]
        raise CheckpointError(
            f"{len(absent)} tensors of the policy are missing in {file} and {len(differing)} differ from it (for example "
            f"{named}), so it would act with random weights. The file belongs to another version or configuration; fetch or "
            "train it again."
        )


def _action_dim(config: Any) -> int:
    feature = config.action_feature
    if feature is None:
        raise CheckpointError("the policy's config names no output 'action'; expected its shape in output_features.")
    dim, width = int(feature.shape[0]), int(getattr(config, "max_action_dim", feature.shape[0]))
    if dim > width:
        raise CheckpointError(
            f"the policy's actions have {dim} dimensions and its network {width}; the config was changed."
        )
    return dim


def _normaliser(postprocessor: Any, dim: int) -> Normaliser | None:
    """Return the map from the robot's actions to the policy's, from the step of the postprocessor that undoes it.

    Raises:
        CheckpointError: there is none, its statistics are missing, or its mode is unknown.
    """
    step = next((one for one in postprocessor.steps if type(one).__name__ == "UnnormalizerProcessorStep"), None)
    if step is None:
        raise CheckpointError(
            "the postprocessor has no step that undoes the normalisation of actions; expected LeRobot's "
            f"unnormalizer_processor among {', '.join(type(one).__name__ for one in postprocessor.steps) or 'no steps'}."
        )
    modes = {_plain(kind): str(_plain(mode)) for kind, mode in step.norm_map.items()}
    mode = modes.get("ACTION", IDENTITY)
    if mode == IDENTITY:
        return None
    if mode not in MODES:
        raise CheckpointError(
            f"actions are normalised by the unknown mode {mode!r}; known: {', '.join(MODES)}, {IDENTITY}."
        )
    kind, names = MODES[mode]
    statistics = {name: torch.as_tensor(value) for name, value in (step.stats or {}).get("action", {}).items()}
    absent = [name for name in names if name not in statistics]
    if absent:
        raise CheckpointError(
            f"the postprocessor undoes {mode} without the actions' {' and '.join(absent)}, so normalised numbers would reach the "
            "robot. A base model comes without statistics: fine-tune it, or make its processors with those of your dataset "
            "(make_pre_post_processors(config, dataset_stats=dataset.meta.stats))."
        )
    first, second = (statistics[name].double().reshape(-1)[:dim] for name in names)
    offset, scale = (first, second) if mode == "MEAN_STD" else ((first + second) / 2, (second - first) / 2)
    if len(offset) != dim or not bool((scale >= 0).all()):
        raise CheckpointError(
            f"the statistics of actions have {len(offset)} entries for {dim} dimensions, or a negative width; expected "
            f"{names[0]} and {names[1]} of shape ({dim},)."
        )
    return Normaliser(offset, scale.clamp_min(SMALLEST_SCALE), kind)


def _check_postprocessor(postprocessor: Any, spec: ActionSpec, width: int) -> None:
    """Check that the postprocessor does what `denormalise` does, on numbers from the whole range.

    Args:
        postprocessor: LeRobot's.
        spec: with the normalisation that was read from it.
        width: the size of the actions that the policy hands to it.

    Raises:
        MismatchError: it does more than that.
    """
    probe = torch.linspace(-3.0, 3.0, 7 * width).reshape(7, width).roll(3, dims=1)
    expected = spec.denormalise(torch.nn.functional.pad(probe, (0, spec.state_dim - width)))
    steps = ", ".join(type(one).__name__ for one in postprocessor.steps)
    try:
        found = postprocessor(probe).cpu()
    except Exception as error:  # whatever its steps raise
        raise MismatchError(f"the postprocessor ({steps}) can't be used on actions alone: {error}.") from error
    bound = TOLERANCE * (1.0 + expected.abs())
    if found.shape != expected.shape or not bool(((found - expected).abs() <= bound).all()):
        raise MismatchError(
            f"the postprocessor ({steps}) does more to actions than undo a normalisation, so references and noises would mean "
            "something else than what is executed. Take the other steps out and apply them to what the policy returns."
        )


def _check_image(name: str, image: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check an image (B, C, H, W), or several moments of it (B, S, C, H, W).

    Raises:
        InvalidInputError: its layout, type or range is wrong.
    """
    expected = f"float32 (B, {shape[0]}, H, W) in [0, 1]"
    hint = ""
    if image.ndim in (4, 5) and image.shape[-3] != shape[0] and image.shape[-1] == shape[0]:
        hint = " Its channels are last: image.permute(0, 3, 1, 2)."
    if image.dtype == torch.uint8:
        hint += " Its values are bytes: image.float() / 255."
    if image.ndim not in (4, 5) or image.shape[-3] != shape[0] or not image.is_floating_point():
        raise InvalidInputError(f"{name} is {image.dtype} of shape {tuple(image.shape)}; expected {expected}.{hint}")
    if inspectable(image):
        low, high = float(image.min()), float(image.max())
        if not (low >= -1e-3 and high <= 1.0 + 1e-3):
            raise InvalidInputError(
                f"{name} goes from {low:.4g} to {high:.4g}; expected {expected}. Bytes are divided by 255, and LeRobot's "
                "policies normalise by themselves."
            )
    return image.float()


def _check_state(name: str, state: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Check a state (B, D), or several moments of it (B, S, D).

    Raises:
        MismatchError: it has another size.
        InvalidInputError: it isn't finite.
    """
    if state.ndim not in (2, 3) or state.shape[-1] != shape[0]:
        raise MismatchError(f"{name} has shape {tuple(state.shape)}; this policy sees (B, {shape[0]}).")
    if inspectable(state) and not bool(torch.isfinite(state).all()):
        raise InvalidInputError(f"{name} holds NaN or infinite values; look for them where they were measured.")
    return state.float()


def _plain(value: Any) -> Any:
    """Return a config's value as json knows it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(name)): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _plain(vars(value)) if hasattr(value, "__dict__") else str(value)


def _remembered(folder: Path, description: dict[str, Any]) -> Path | None:
    """Return where the fingerprint of a folder is remembered; None where its weights are small, or it can't be read."""
    try:
        files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    except OSError:
        return None
    if sum(found.st_size for name, found in files if name.endswith(".safetensors")) < LARGE_WEIGHTS:
        return None
    identity = [(name, found.st_size, found.st_mtime_ns, found.st_ino) for name, found in files]
    key = hashlib.sha256(
        json.dumps([str(folder.resolve()), identity, description], sort_keys=True).encode()
    ).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "counterflow" / "fingerprints" / f"{key[:32]}.json"
