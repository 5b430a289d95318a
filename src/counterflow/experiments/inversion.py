"""Noises for demonstrations: every chunk of a dataset with the noise from which the frozen policy would make it.

What comes out is the dataset itself, in the same layout, with more arrays, one row a step as all of them:

    noise                 (N, H, A)  the noise of the chunk that begins at this step
    features              (N, F)     what the policy makes of the step's observation, where it offers features
    reconstruction_error  (N,)       largest entry by which denoising that noise misses the chunk, normalised units
    normalised_actions    (N, A)     the actions in the policy's units
    noise_valid           (N,)       whether the noise may be learned from: a whole chunk begins here, and the error is small

Sources: FlowDAgger (arXiv 2607.08877) for the exact inversion of the discrete Euler map; the Euler reversal of arXiv 2606.13675
beside it, for comparison; and, for noises that are to be learned, the smallest noise that comes near the chunk. A flow presses a
wide range of noises into a narrow range of actions, so an exact noise has large parts that hardly move the action: to a network
that regresses noises they are noise in its labels, and what a penalty on them leaves is what decides.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from counterflow.binding import Binding
from counterflow.checks import POSITIVE, check_name, check_numbers
from counterflow.data import EpisodeDataset, SteeringDataset
from counterflow.data.npz import save_npz
from counterflow.envs import describe
from counterflow.errors import DatasetError, InvalidInputError
from counterflow.experiments.evaluate import load_prior
from counterflow.experiments.train import check_dataset
from counterflow.files import replacing, write_json
from counterflow.flow import Field, denoise, invert, refine, reverse
from counterflow.flow.field import flatten_rows
from counterflow.policies import BasePolicy, bind
from counterflow.steering import binding_of
from counterflow.steering.steered import check_steps

Method = Literal["exact", "euler", "regularised"]
FORMAT = "counterflow/inverted-episodes"
FORMAT_VERSION = 1
QUANTILES = (0.5, 0.9, 0.99, 1.0)
REGULARISED_RATE = 0.1
LARGEST_BEGINNING = 5.0  # beyond it no noise is the prior's


@dataclass(frozen=True)
class InversionSettings:
    """How noises are found.

    Attributes:
        steps: K, with which the noise will be denoised.
        method: "exact" inverts the discrete Euler map; "euler" is Euler reversal; "regularised" searches the noise w that
            minimises ||denoise(w) - chunk||^2 + penalty ||w||^2, and misses the chunk a little (see
            `InversionSettings.of`).
        iterations: Adam updates that refine the noises of chunks beyond the tolerance, 0: none; "regularised" refines all.
        penalty: what a squared unit of noise may cost in squared error while refining.
        tolerance: largest reconstruction error of an entry, normalised units, of a noise that may be learned from.
        batch_size: chunks at a time.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: no such method.
    """

    steps: int = 5
    method: Method = "exact"
    iterations: int = 0
    penalty: float = 0.0
    tolerance: float = 0.01
    batch_size: int = 2_048

    @classmethod
    def of(cls, method: Method, steps: int = 5, **given: Any) -> InversionSettings:
        """Return settings that suit a method: for "regularised" 30 updates, penalty 0.001, tolerance 0.5, unless `given`."""
        own = {"iterations": 30, "penalty": 0.001, "tolerance": 0.5} if method == "regularised" else {}
        return cls(steps, method, **{**own, **given})

    def __post_init__(self) -> None:
        """Check every setting."""
        check_steps(self.steps)
        check_name("inversion method", self.method, Method)
        check_numbers(self, or_zero=() if self.method == "regularised" else ("iterations",))
        POSITIVE.check_all(self, "tolerance")


@dataclass(frozen=True)
class Inverted:
    """What an inversion found.

    Attributes:
        path: the dataset with noises.
        chunks: how many were inverted.
        flagged: how many of them are beyond the tolerance.
        errors: quantile -> reconstruction error, normalised units.
        noise_norm: mean root mean square entry of the valid noises; about 1 for the prior's own actions.
    """

    path: Path
    chunks: int
    flagged: int
    errors: dict[str, float]
    noise_norm: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "path": self.path.name}


@torch.no_grad()
def invert_chunks(
    policy: BasePolicy, observations: Tensor, chunks: Tensor, settings: InversionSettings
) -> tuple[Tensor, Tensor]:
    """Return noises (B, H, A) and reconstruction errors (B,) of chunks (B, H, A), normalised, at observations (B, ...)."""
    chunks = chunks.to(getattr(policy, "device", chunks.device))
    return invert_field(bind(policy, policy.encode(observations)), chunks, settings)


@torch.no_grad()
def invert_field(field: Field, chunks: Tensor, settings: InversionSettings) -> tuple[Tensor, Tensor]:
    """Return noises and reconstruction errors of chunks (B, H, A), normalised, under a policy's field for B observations."""
    if settings.method == "regularised":
        beginning = torch.nan_to_num(reverse(field, chunks, settings.steps))
        beginning = beginning.clamp(-LARGEST_BEGINNING, LARGEST_BEGINNING)
        noise: Tensor = refine(
            field, chunks, settings.steps, beginning, settings.iterations, REGULARISED_RATE, settings.penalty
        )
        return noise, _errors(field, noise, chunks, settings.steps)
    find = invert if settings.method == "exact" else reverse
    noise = find(field, chunks, settings.steps)
    errors = _errors(field, noise, chunks, settings.steps)
    if settings.iterations and not bool((errors <= settings.tolerance).all()):
        refined = refine(field, chunks, settings.steps, noise, iterations=settings.iterations, penalty=settings.penalty)
        again = _errors(field, refined, chunks, settings.steps)
        better = ((again < errors) & (errors > settings.tolerance)) | (errors.isnan() & ~again.isnan())
        noise, errors = torch.where(better[:, None, None], refined, noise), torch.where(better, again, errors)
    return noise, errors


def _errors(field: Any, noise: Tensor, chunks: Tensor, steps: int) -> Tensor:
    """Return by how much denoising misses, (B,); NaN where the noise is not finite: a flow that runs away gives none."""
    finite = torch.isfinite(noise).flatten(1).all(1)
    missed = flatten_rows(denoise(field, torch.where(finite[:, None, None], noise, 0.0), steps) - chunks).abs().amax(1)
    return torch.where(finite, missed, torch.nan)


def invert_dataset(
    path: Path | str,
    env: str,
    out: Path | str,
    settings: InversionSettings | None = None,
    *,
    policy: str | None = None,
    device: str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> Inverted:
    """Add to a dataset the noise of every chunk.

    Args:
        path: an archive in OGBench's layout, or the folder of a steering dataset that was recorded with its steps.
        env: an environment, or a family, that says what the actions mean.
        out: where the result goes (.npz); its description goes beside it (.json).
        settings: how noises are found.
        policy: the frozen policy; None: the shipped prior of the environment's family.
        device: where to compute.
        on_progress: called with (chunks done, chunks in all).

    Raises:
        DatasetError: the dataset is damaged, or no episode is as long as a chunk.
        MismatchError: dataset, environment and policy don't fit.
        StorageError: the result can't be written.
    """
    settings = InversionSettings() if settings is None else settings
    path, out, spec = Path(path), Path(out), describe(env)
    if out.suffix != ".npz":
        raise InvalidInputError(f"the noises should go to {out}; expected a name that ends in '.npz'.")
    prior = load_prior(spec.name, policy, device)
    dataset = step_episodes(path) if path.is_dir() else EpisodeDataset.load_all(path)
    check_dataset(dataset, spec, path)
    arrays, found = add_noises(dataset, prior, settings, on_progress)
    binding = binding_of(prior, settings.steps)
    with replacing(out) as temporary:
        save_npz(temporary, arrays)
        # Before the new noises come: a kill must not leave them beside a description of others.
        out.with_suffix(".json").unlink(missing_ok=True)
    result = Inverted(out, **found)
    write_json(
        out.with_suffix(".json"),
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "binding": binding.to_json(),
            "env": spec.name,
            "from": path.name,
            "settings": asdict(settings),
            **result.to_json(),
        },
    )
    return result


def add_noises(
    dataset: EpisodeDataset,
    policy: BasePolicy,
    settings: InversionSettings,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return all arrays of a dataset with those of its noises (see the top of this file), and what was found.

    Raises:
        DatasetError: no episode is as long as a chunk.
    """
    spec = policy.action_spec
    observations = torch.from_numpy(np.ascontiguousarray(dataset.gather("observations"), np.float32))
    actions = torch.from_numpy(np.ascontiguousarray(dataset.gather("actions"), np.float32))
    ends = np.cumsum(dataset.lengths)
    inside = [
        np.arange(end - length, end - spec.horizon + 1) + spec.past  # where a chunk is decided on, its past is over
        for end, length in zip(ends, dataset.lengths, strict=True)
    ]
    starts = torch.from_numpy(np.concatenate(inside))
    if len(starts) == 0:
        raise DatasetError(
            f"a chunk has {spec.horizon} actions and the longest of {dataset.num_episodes} episodes {dataset.lengths.max()} "
            "steps. Use longer episodes, or a policy with a shorter horizon."
        )
    rows = len(observations)
    noise = np.zeros((rows, spec.horizon, spec.state_dim), np.float32)
    errors = np.full(rows, np.nan, np.float32)
    window = torch.arange(spec.horizon) - spec.past
    for first in range(0, len(starts), settings.batch_size):
        some = starts[first : first + settings.batch_size]
        chunks = spec.normalise(actions[some[:, None] + window])
        found, missed = invert_chunks(policy, observations[some], chunks, settings)
        noise[some.numpy()], errors[some.numpy()] = found.cpu().numpy(), missed.cpu().numpy()
        if on_progress is not None:
            on_progress(min(first + settings.batch_size, len(starts)), len(starts))
    finite = np.isfinite(noise).all((1, 2))
    noise[~finite] = 0.0  # its error is NaN
    valid = (errors <= settings.tolerance) & finite
    terminals = np.zeros(rows, bool)
    terminals[ends - 1] = True
    arrays: dict[str, npt.NDArray[Any]] = {name: dataset.gather(name) for name in dataset.arrays}
    arrays |= {"terminals": terminals, "noise": noise, "reconstruction_error": errors, "noise_valid": valid}
    arrays["normalised_actions"] = spec.normalise(actions).numpy()
    if hasattr(policy, "features"):
        with torch.no_grad():
            features: Tensor = policy.features(policy.encode(observations))
        arrays["features"] = features.float().cpu().numpy()
    measured = errors[starts.numpy()]
    quantiles = np.nanquantile(measured, QUANTILES)
    return arrays, {
        "chunks": len(starts),
        "flagged": int(len(starts) - valid.sum()),
        "errors": {f"{100 * share:g}%": float(value) for share, value in zip(QUANTILES, quantiles, strict=True)},
        "noise_norm": float(np.sqrt(np.square(noise[valid]).mean())) if valid.any() else float("nan"),
    }


def step_episodes(path: Path | str) -> EpisodeDataset:
    """Return the successful episodes of a steering dataset step by step, as demonstrations.

    Raises:
        DatasetError: it was recorded without its steps, or holds no success.
    """
    dataset = SteeringDataset.load(path).require_successes()
    steps = dataset.concatenated(("step_observations", "step_actions"))
    lengths = np.bincount(steps["episode"]).astype(np.int64)
    arrays = {"observations": steps["step_observations"], "actions": steps["step_actions"]}
    return EpisodeDataset(arrays, np.cumsum(lengths) - lengths, lengths)


def read_binding(path: Path | str) -> Binding:
    """Return what the noises of an inverted dataset belong to.

    Raises:
        DatasetError: the description beside it is missing or damaged.
    """
    return described_binding(path, Path(path).with_suffix(".json"), FORMAT, FORMAT_VERSION, "counterflow invert")


def described_binding(data: Path | str, file: Path, kind: str, version: int, maker: str) -> Binding:
    """Return what a description of noises says that they belong to.

    Args:
        data: the dataset.
        file: its description.
        kind: the format that is expected.
        version: its newest version that is known.
        maker: the command that makes such a dataset.

    Raises:
        DatasetError: the description is missing, damaged, another one, or newer.
    """
    try:
        content = json.loads(file.read_text())
        if content["format"] != kind or content["format_version"] > version:
            raise DatasetError(
                f"{file} is {content['format']!r}, version {content['format_version']}; expected {kind!r} up to version "
                f"{version}. Upgrade counterflow, or make the dataset again with '{maker}'."
            )
        return Binding.from_json(content["binding"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DatasetError):
            raise
        raise DatasetError(
            f"{data} has no description of its noises ({file.name}: {type(error).__name__} {error}), so nobody knows which "
            f"policy they belong to. Make it with '{maker}'."
        ) from error
