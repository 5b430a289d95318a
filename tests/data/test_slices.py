"""Slices take turns by the count of updates alone, and never are more than two in memory."""

from __future__ import annotations

import gc
import threading
import weakref
from pathlib import Path
from typing import ClassVar

import pytest

from counterflow.data import SliceStream
from counterflow.errors import DatasetError, InvalidInputError


class Slice:
    """What a test loads."""

    alive: ClassVar[weakref.WeakSet[Slice]] = weakref.WeakSet()
    most: ClassVar[int] = 0

    def __init__(self, path: Path) -> None:
        gc.collect()
        self.name = path.stem
        self.thread = threading.current_thread().name
        Slice.alive.add(self)
        Slice.most = max(Slice.most, len(Slice.alive))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.npz", "a.npz", "c.npz", "a-val.npz", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def test_slices_in_order_each_for_its_updates(folder: Path) -> None:
    with SliceStream(folder, Slice, every=3) as stream:
        names = "".join(stream.at(update).name for update in range(12))
    assert names == "aaabbbcccaaa"


def test_a_resumed_stream_goes_on_with_the_same_slice(folder: Path) -> None:
    with SliceStream(folder, Slice, every=3) as stream:
        assert stream.at(1000).name == "abc"[1000 // 3 % 3]
        assert stream.at(0).name == "a"
        assert stream.at(1).name == "a"
        assert stream.at(8).name == "c"  # the thread had loaded b for nothing


def test_the_next_is_loaded_by_a_thread_and_two_are_the_most(folder: Path) -> None:
    Slice.alive.clear()
    Slice.most = 0
    with SliceStream(folder, Slice, every=3) as stream:
        for update in range(30):
            current = stream.at(update)
            assert current.thread.startswith("slices") == (update >= 3)
        assert stream._next is not None
        stream._next[1].result()
        assert stream.at(106).name == "c"  # b, which the thread has loaded, is let go first
    assert Slice.most == 2


def test_an_error_comes_when_the_slice_is_due_and_may_pass(folder: Path) -> None:
    broken = True

    def load(path: Path) -> str:
        if path.stem == "b" and broken:
            raise DatasetError("b is damaged.")
        return path.stem

    with SliceStream(folder, load, every=2) as stream:
        assert stream.at(0) == stream.at(1) == "a"
        with pytest.raises(DatasetError, match="b is damaged"):
            stream.at(2)
        broken = False
        assert stream.at(2) == "b"


def test_bad_input(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="every is 0"):
        SliceStream(folder, Slice, every=0)
    with SliceStream(folder, Slice) as stream, pytest.raises(InvalidInputError, match="update is -1"):
        stream.at(-1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x-val.npz").touch()
    with pytest.raises(DatasetError, match="holds no slices"):
        SliceStream(tmp_path / "empty", Slice)
