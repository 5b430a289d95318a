"""Keys of a terminal, pressed by hand; and once in a real pseudo-terminal, end to end."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterflow.cockpit.session import Session
from counterflow.cockpit.terminal import Keys, half_blocks, screen

MakeSession = Callable[..., Session]


def press(keys: Keys, session: Session, text: str | list[str], now: float = 0.0) -> None:
    for key in text:
        assert keys.press(key, now)
        while session.advance(now):
            now += 0.05


def test_a_key_is_a_chunk(make_session: MakeSession) -> None:
    session = make_session()
    keys = Keys(session)
    before = session.effector[2]
    press(keys, session, ["s", "s", "\x1b[D"])
    assert session.effector[2] < before
    assert [len(one.step_actions) for one in session.episode.decisions] == [5, 5, 5]
    assert any("step 15 of" in line for line in screen(session))


def test_every_key_does_what_the_help_says(make_session: MakeSession) -> None:
    session = make_session()
    keys = Keys(session)
    press(keys, session, " ")
    assert session.control.gripper == "close"
    press(keys, session, "g")
    assert session.control.gripper == "policy"
    press(keys, session, "2")
    assert session.helm.choice.method == "direct"
    press(keys, session, "6")  # there is no noise policy yet: said, not raised
    assert "no noise policy" in screen(session)[5]
    press(keys, session, "l")
    assert "less" in screen(session, keys.less)[2]
    press(keys, session, "p")
    assert session.state == "paused"
    press(keys, session, "a")
    assert (session.pilot, session.state) == ("policy", "driving")
    press(keys, session, "r")
    assert session.episode.index == 1
    assert not keys.press("q", 0.0)


def test_a_picture_in_half_blocks() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    image[4:] = 255
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    lines = half_blocks(buffer.getvalue(), 4, 10)
    assert [line.count("\u2580") for line in lines] == [4, 4]
    assert "38;2;0;0;0" in lines[0]
    assert "38;2;255;255;255" in lines[1]


def test_in_a_real_terminal(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "counterflow.cli", "cockpit", "ogbench/cube-single-task1", "--terminal"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run"), "--size", "64"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "LINES": "24", "COLUMNS": "120"},
    )
    os.close(theirs)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while not re.search(text, seen):
            assert select.select([ours], [], [], 60)[0], seen[-2000:]
            seen += os.read(ours, 65536).decode(errors="replace")

    until("paused   step 0")
    os.write(ours, b"s")
    until("driving   step 5 of")
    os.write(ours, b"q")
    until("stopped")
    assert process.wait(60) == 0
    os.close(ours)


def test_without_a_terminal_it_says_so(tmp_path: Path) -> None:
    from rich.console import Console

    from counterflow.cockpit.session import SessionSettings
    from counterflow.cockpit.terminal import drive_in_terminal
    from counterflow.errors import InvalidInputError

    with pytest.raises(InvalidInputError, match="needs a terminal"):
        drive_in_terminal(SessionSettings("ogbench/cube-single-task1", tmp_path), Console())
