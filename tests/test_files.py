"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from counterflow.errors import StorageError
from counterflow.files import replacing, save_tensors, write_between, write_json


def test_it_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "new" / "x.json"
    write_json(target, {"a": 1})
    write_json(target, {"a": 2})
    assert json.loads(target.read_text()) == {"a": 2}
    assert [path.name for path in target.parent.iterdir()] == ["x.json"]
    assert stat.S_IMODE(target.stat().st_mode) & 0o600 == 0o600


def test_a_failure_in_the_middle_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")

    def interrupted() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            assert target.read_text() == "old"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_json(tmp_path / "x.json", [1])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"x\.json: the disk is full.*untouched"):
        write_json(tmp_path / "x.json", [2])
    assert json.loads((tmp_path / "x.json").read_text()) == [1]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="can't write"):
        write_json(tmp_path / "file" / "x.json", [])


def test_what_is_not_json_is_the_callers_mistake_and_leaves_no_trace(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", [object()])
    assert not list(tmp_path.iterdir())


class TestTensors:
    def test_they_come_back(self, tmp_path: Path) -> None:
        save_tensors({"x": torch.arange(3)}, tmp_path / "x", {"made": "here"})
        assert load_file(tmp_path / "x")["x"].tolist() == [0, 1, 2]

    def test_what_the_system_refuses_is_its_own_error(
        self, tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
    ) -> None:
        target = tmp_path / "x"
        target.write_text("old")
        with (
            largest_file(1000),
            pytest.raises(StorageError, match="can't write .*: File too large"),
            replacing(target) as temporary,
        ):
            save_tensors({"x": torch.zeros(1000)}, temporary)
        assert target.read_text() == "old"
        assert list(tmp_path.iterdir()) == [target]

    @pytest.mark.parametrize(
        ("words", "reason"),
        [
            ("I/O error: No space left on device (os error 28)", "the disk is full"),
            ("something else", "something else"),
        ],
    )
    def test_the_formats_own_error_is_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, reason: str
    ) -> None:
        def refuse(*_: object) -> None:
            raise SafetensorError(words)

        monkeypatch.setattr("safetensors.torch.save_file", refuse)
        with pytest.raises(StorageError, match=rf"can't write .*: {reason}"), replacing(tmp_path / "x") as temporary:
            save_tensors({}, temporary)


class TestBetweenMarks:
    TEXT = "before\n<!-- a: written by x/run.py -->\nold\n<!-- /a -->\nbetween <!-- /b -->\n<!-- b: written by x/run.py -->\n"

    def test_only_what_stands_between_the_marks_changes(self, tmp_path: Path) -> None:
        document = tmp_path / "README.md"
        document.write_text(self.TEXT)
        assert write_between(document, "a", "x/run.py", "new\nlines\n")
        assert document.read_text() == self.TEXT.replace("old", "new\nlines")
        assert write_between(document, "a", "x/run.py", "")
        assert document.read_text() == self.TEXT.replace("old\n", "")

    def test_without_its_marks_a_document_stays_as_it_was(self, tmp_path: Path) -> None:
        document = tmp_path / "README.md"
        document.write_text(self.TEXT)
        for name, command in (("c", "x/run.py"), ("a", "y/run.py"), ("b", "x/run.py")):  # b is closed before it begins
            assert not write_between(document, name, command, "new")
        assert document.read_text() == self.TEXT

    def test_a_failed_write_leaves_the_document_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        document = tmp_path / "README.md"
        document.write_text(self.TEXT)

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        with pytest.raises(StorageError):
            write_between(document, "a", "x/run.py", "new")
        assert document.read_text() == self.TEXT
