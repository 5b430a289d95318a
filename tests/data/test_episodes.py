"""Reading datasets: everything is checked where it enters, in memory and mapped."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.data import EpisodeDataset
from counterflow.errors import DatasetError, InvalidInputError, StorageError


def arrays(lengths: tuple[int, ...] = (4, 3, 5), **changes: Any) -> dict[str, Any]:
    steps = sum(lengths)
    terminals = np.zeros(steps, bool)
    terminals[np.cumsum(lengths) - 1] = True
    rows = np.arange(steps, dtype=np.float32)[:, None]
    return {"observations": rows + np.array([0.0, 100.0]), "actions": np.sin(rows), "terminals": terminals, **changes}


def saved(path: Path, *, compressed: bool = False, **content: Any) -> Path:
    (np.savez_compressed if compressed else np.savez)(path, **content)
    return path


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("compressed", [False, True])
class TestLoading:
    def test_episodes_are_found(self, mmap: bool, compressed: bool, tmp_path: Path) -> None:
        """Ours are stored, official downloads are compressed; both can be read and mapped."""
        path = saved(tmp_path / "x.npz", compressed=compressed, **arrays(qpos=np.arange(12)))
        dataset = EpisodeDataset.load(path, mmap=mmap, keys=("qpos",))
        assert dataset.num_episodes == 3
        assert dataset.num_steps == 12
        assert dataset.lengths.tolist() == [4, 3, 5]
        assert dataset.observation_shape == (2,)
        assert dataset.action_dim == 1
        np.testing.assert_array_equal(dataset.episode(1)["qpos"], [4, 5, 6])
        np.testing.assert_array_equal(dataset.episode(2)["observations"][:, 1], 100 + np.arange(7, 12))
        assert isinstance(dataset.arrays["observations"], np.memmap) == mmap

    def test_nan_is_found(self, mmap: bool, compressed: bool, tmp_path: Path) -> None:
        content = arrays()
        content["actions"][5] = np.nan
        path = saved(tmp_path / "x.npz", compressed=compressed, **content)
        with pytest.raises(DatasetError, match="actions that are NaN or infinite, first at step 5"):
            EpisodeDataset.load(path, mmap=mmap)

    def test_a_truncated_file(self, mmap: bool, compressed: bool, tmp_path: Path) -> None:
        path = saved(tmp_path / "x.npz", compressed=compressed, **arrays())
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DatasetError, match=r"truncated, damaged.*again"):
            EpisodeDataset.load(path, mmap=mmap)


class TestDamage:
    def test_a_flipped_bit_in_a_compressed_file(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "x.npz", compressed=True, **arrays((4000,)))
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 0xFF
        path.write_bytes(content)
        with pytest.raises(DatasetError, match="damaged"):
            EpisodeDataset.load(path)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"actions": np.zeros((11, 1))}, "same length"),
            ({"actions": np.zeros(12)}, r"actions of shape \(12,\)"),
            ({"terminals": np.zeros(12, bool)}, "cut off"),
            ({"terminals": np.full(12, 2)}, "one 0 or 1 a step"),
            ({"observations": np.full((12, 2), "x")}, "expected numbers"),
        ],
    )
    def test_a_wrong_layout_is_explained(self, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match=message):
            EpisodeDataset.load(saved(tmp_path / "x.npz", **arrays(**changes)))

    def test_missing_arrays_and_files(self, tmp_path: Path) -> None:
        with pytest.raises(DatasetError, match="has no terminals; it has"):
            EpisodeDataset.load(saved(tmp_path / "x.npz", observations=np.zeros((2, 1)), actions=np.zeros((2, 1))))
        with pytest.raises(DatasetError, match="there is no dataset"):
            EpisodeDataset.load(tmp_path / "nothing.npz")
        (tmp_path / "text.npz").write_text("no archive at all")
        with pytest.raises(DatasetError, match="not an npz archive"):
            EpisodeDataset.load(tmp_path / "text.npz")

    def test_a_full_disk_while_unpacking(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = saved(tmp_path / "x.npz", compressed=True, **arrays())

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("counterflow.data.npz.write_npz", full)
        with pytest.raises(StorageError, match=r"the disk is full.*mmap=False"):
            EpisodeDataset.load(path, mmap=True)
        assert EpisodeDataset.load(path).num_episodes == 3


class TestHeldOut:
    def test_the_file_beside(self, tmp_path: Path) -> None:
        saved(tmp_path / "x-val.npz", **arrays((2,)))
        training, held_out = EpisodeDataset.load_with_validation(saved(tmp_path / "x.npz", **arrays()))
        assert (training.num_episodes, held_out.num_episodes) == (3, 1)

    def test_split_off_whole_episodes(self, tmp_path: Path) -> None:
        path = saved(tmp_path / "x.npz", **arrays((2,) * 10))
        training, held_out = EpisodeDataset.load_with_validation(path, validation_fraction=0.3)
        assert (training.num_episodes, held_out.num_episodes) == (7, 3)
        together = np.concatenate([training.gather("observations"), held_out.gather("observations")])
        np.testing.assert_array_equal(np.sort(together[:, 0]), np.arange(20))

    def test_one_episode_cannot_be_split(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="single episode"):
            EpisodeDataset.load_with_validation(saved(tmp_path / "x.npz", **arrays((5,))))

    def test_no_such_episode(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="expected 0 to 2"):
            EpisodeDataset.load(saved(tmp_path / "x.npz", **arrays())).episode(3)
