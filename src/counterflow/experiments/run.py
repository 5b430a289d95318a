"""A run: one folder that holds a training's settings, numbers and checkpoints, and survives a kill at any moment.

runs/<name>/config.yaml      every setting; enough to run it again
runs/<name>/metrics.jsonl    one line a report: step and numbers
runs/<name>/events.*         the same for TensorBoard
runs/<name>/checkpoints/     policy.safetensors + policy.json, and state.safetensors to go on from
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from counterflow.errors import CheckpointError, InvalidInputError, MismatchError, StorageError, TrainingError
from counterflow.files import reason_of, replacing, save_tensors, storage_error, take_lock


class Run:
    """A run's folder, open for training; a context manager.

    Args:
        folder: where the run lives; made if it is missing.
        config: every setting, as plain values. A folder that holds a run with other settings is refused.

    Raises:
        TrainingError: the folder holds a run with other settings, or another process is training there.
        StorageError: the folder can't be written.
    """

    def __init__(self, folder: Path | str, config: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.policy_path = self.checkpoints / "policy.safetensors"
        self._state_path = self.checkpoints / "state.safetensors"
        self._metrics_path = self.folder / "metrics.jsonl"
        self._config = json.loads(json.dumps(config))  # plain values, as they come back from the file
        self._config_path = self.folder / "config.yaml"
        self._new = False
        self._board: Any = None
        with _storing(self.folder):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
        self._lock = self._locked()
        try:
            self._write_or_compare_config()
        except BaseException:
            self._lock.close()
            raise

    def __enter__(self) -> Run:
        """Return self; files are closed when the block ends."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files and let others train here; settings that were refused before anything came of them don't stay."""
        try:
            if isinstance(error, InvalidInputError | MismatchError) and self._new and not self._begun():
                self._config_path.unlink(missing_ok=True)
            if self._board is not None:
                with _storing(self.folder):
                    self._board.close()
        finally:
            self._lock.close()

    def load_state(self) -> dict[str, Tensor] | None:
        """Return the training state of the last checkpoint, or None if there is none yet.

        Raises:
            CheckpointError: it is damaged.
        """
        if not self._state_path.exists():
            return None
        try:
            return load_file(self._state_path)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{self._state_path} is damaged: {error}. Delete it to begin the run anew; the last policy beside it stays "
                "until the next checkpoint."
            ) from error

    def save_state(self, state: Mapping[str, Tensor]) -> None:
        """Keep the training state, in place of the last.

        Raises:
            StorageError: it can't be written; the last one is untouched.
        """
        with replacing(self._state_path) as temporary:
            save_tensors(state, temporary)

    def forget_after(self, step: int) -> None:
        """Drop the numbers of updates after `step`, which a resumed training will report again."""
        if not self._metrics_path.exists():
            return
        kept = [line for line in self._metrics_path.read_text().splitlines() if 0 <= _step_of(line) <= step]
        with replacing(self._metrics_path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def report(self, step: int, **numbers: float) -> None:
        """Write numbers to the metrics and to TensorBoard.

        Raises:
            StorageError: they can't be written.
        """
        with _storing(self._metrics_path):
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter  # slow to import

                self._board = SummaryWriter(str(self.folder), purge_step=step)
            with self._metrics_path.open("a") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)  # its thread may report a full disk at a later call

    def metrics(self) -> list[dict[str, float]]:
        """Return everything reported so far."""
        if not self._metrics_path.exists():
            return []
        return [json.loads(line) for line in self._metrics_path.read_text().splitlines() if _step_of(line) >= 0]

    def _locked(self) -> IO[str]:
        try:
            return take_lock(self.folder / ".lock")
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {self.folder}. Wait until it has finished, or choose another folder."
            ) from None
        except OSError as error:
            raise storage_error(self.folder, reason_of(error)) from error

    def _write_or_compare_config(self) -> None:
        if self._config_path.exists():
            found = read_config(self._config_path)
            changed = sorted(name for name in {*found, *self._config} if found.get(name) != self._config.get(name))
            if changed:
                listing = ", ".join(
                    f"{name} {found.get(name)!r} there, {self._config.get(name)!r} here" for name in changed
                )
                raise TrainingError(
                    f"{self.folder} holds a run with other settings ({listing}). Use the same ones to go on with it, or "
                    "choose another folder."
                )
            return
        with replacing(self._config_path) as temporary:
            temporary.write_text(yaml.safe_dump(self._config, sort_keys=False))
        self._new = True

    def _begun(self) -> bool:
        """Say whether anything was trained."""
        return self._metrics_path.exists() or any(self.checkpoints.iterdir())


def read_config(path: Path | str) -> dict[str, Any]:
    """Read a run's settings.

    Raises:
        TrainingError: the file is missing or can't be read.
    """
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise TrainingError(f"{path} can't be read as a run's settings: {error}. Choose another folder.") from error
    if not isinstance(content, dict):
        raise TrainingError(f"{path} holds no settings; expected a run's config.yaml. Choose another folder.")
    return content


def _step_of(line: str) -> float:
    """Return a report's step, or -1 where a kill cut the line off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1.0


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise storage_error(path, reason_of(error)) from error
