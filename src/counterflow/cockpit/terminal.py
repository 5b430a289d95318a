"""Driving with a terminal's keys: over ssh, in tmux, without a browser and without the extra.

A terminal says when a key goes down and never when it is let go, so a key is a tap here: one chunk, and the next one if the
key repeats. The picture is drawn with half blocks, where there is room and colour.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
from PIL import Image
from rich.console import Console

from counterflow.cockpit.session import Session, SessionSettings
from counterflow.cockpit.targets import METHODS
from counterflow.errors import CounterflowError, InvalidInputError
from counterflow.reasoners import Reasoner

WAYS = {
    "\x1b[A": "away",
    "\x1b[B": "nearer",
    "\x1b[C": "right",
    "\x1b[D": "left",
    "w": "up",
    "s": "down",
    "e": "policy",
}
HELP = (
    "arrows: move   w s: up, down   space: gripper   e: let the policy decide   a: it drives on   l: less   1-7: method",
    "p: pause   r: new episode   k x: keep, discard   n: next task   t: train   f: film   i: picture   q: quit",
)
HOME, CLEAR_BELOW, CLEAR_LINE = "\x1b[H", "\x1b[J", "\x1b[K"
ROOM = (20, 60)  # rows and columns below which no picture is drawn
TEXT_ROWS = 10


class Keys:
    """What keys do to a session.

    Args:
        session: the session.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.less = False
        self.picture = True

    def press(self, key: str, now: float) -> bool:
        """Act on a key; return False when it means the end. What can't be done becomes a note."""
        try:
            return self._act(key, now)
        except CounterflowError as error:
            self.session.note(str(error), "error")
            return True

    def _act(self, key: str, now: float) -> bool:
        session = self.session
        if key in ("q", "\x03", "\x04"):
            return False
        if key in WAYS or key in (" ", "g"):
            session.resume()
        if key in WAYS:
            session.control.tap([WAYS[key]], now, less=self.less)
        elif key == " ":
            session.control.grip("open" if session.control.gripper == "close" else "close", now)
        elif key == "g":
            session.control.grip("policy", now)
        elif key == "a":
            session.choose(pilot="" if session.pilot else "policy")
            session.resume()
        elif key == "l":
            self.less = not self.less
        elif key == "i":
            self.picture = not self.picture
        elif key == "n":
            session.go_to(session.tasks[(session.tasks.index(session.env_name) + 1) % len(session.tasks)])
        elif key in "1234567":
            session.choose(method=METHODS[int(key) - 1])
        else:
            actions: dict[str, Callable[[], None]] = {
                "p": session.pause if session.state == "driving" else session.resume,
                "r": session.begin,
                "k": session.keep,
                "x": session.discard,
                "t": session.start_training,
                "f": session.export_video,
            }
            if key in actions:
                actions[key]()
        return True


def screen(session: Session, less: bool = False) -> list[str]:
    """Return what is said below the picture, line by line."""
    told = session.describe()
    episode, recorded = told["episode"], told["dataset"]["recordings"]
    state = {"finished": f"over: {told['reason']}", "failed": "the simulator failed"}.get(told["state"], told["state"])
    position = " ".join(f"{value:+.3f}" for value in session.effector)
    training = told["training"]
    learning = (
        "" if training is None else f"   {training['name']}: {training['state']} {training['step']}/{training['steps']}"
    )
    tallies = "   ".join(f"{one['method']} {one['successes']} of {one['episodes']}" for one in told["tallies"]) or "-"
    return [
        f"{told['env']}: {told['task']}",
        f"{state}   step {episode['step']} of {episode['max_steps']}   episode {episode['index'] + 1} {episode['kept']}",
        f"{told['method']}, K {told['settings']['reversal_steps']}   gripper {told['gripper']} at {position} m"
        f"{'   less' if less else ''}{'   driven by: ' + told['pilot'] if told['pilot'] else ''}",
        f"tallies: {tallies}",
        f"kept: {recorded['successes']} successes of {recorded['episodes']}{learning}",
        f"> {told['notes'][-1]['text']}" if told["notes"] else "",
        *HELP,
    ]


def half_blocks(jpeg: bytes, columns: int, rows: int) -> list[str]:
    """Draw a picture with half blocks, two pixels a character, as lines of at most so many columns and rows."""
    size = max(2, min(columns, 2 * rows)) // 2 * 2
    pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB").resize((size, size), Image.Resampling.BOX))
    lines = []
    for upper, lower in zip(pixels[::2].tolist(), pixels[1::2].tolist(), strict=True):
        cells = [
            f"\x1b[38;2;{u[0]};{u[1]};{u[2]};48;2;{v[0]};{v[1]};{v[2]}m\u2580"
            for u, v in zip(upper, lower, strict=True)
        ]
        lines.append("".join(cells) + "\x1b[0m")
    return lines


def drive_in_terminal(
    settings: SessionSettings, console: Console, reasoners: Mapping[str, Callable[[str], Reasoner]] | None = None
) -> None:
    """Drive until somebody presses q.

    Raises:
        InvalidInputError: this is no terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InvalidInputError("--terminal needs a terminal to read keys from; this input or output is none.")
    with ThreadPoolExecutor(2) as background:
        with console.status(f"starting the simulator of {settings.env}"):
            session = Session(settings, background, reasoners)
        try:
            with _raw(sys.stdin.fileno()):
                _loop(session, 1.0 / settings.rate)
        finally:
            session.close()
    console.print(f"stopped. What was kept lies in {settings.out}")


def _loop(session: Session, period: float) -> None:
    keys, moved = Keys(session), False
    due = time.monotonic()
    while True:
        now = time.monotonic()
        key = _read_key(max(0.0, due - now) if moved else 0.0 if session.is_moving else 0.1)
        now = time.monotonic()
        if key and not keys.press(key, now):
            return
        if session.pilot and session.state == "driving":
            session.control.report([], now)  # this process is alive, and with it whoever sits here
        if not moved or now >= due:
            moved = session.advance(now)
            due = max(due + period, now) if moved else now
            _draw(session, keys)


def _draw(session: Session, keys: Keys) -> None:
    columns, rows = shutil.get_terminal_size()
    lines: list[str] = []
    room = rows - TEXT_ROWS
    if keys.picture and session.frame is not None and rows >= ROOM[0] + TEXT_ROWS and columns >= ROOM[1]:
        lines += half_blocks(session.frame.jpeg, columns, room)
    lines += [line[: columns - 1] for line in screen(session, keys.less)]
    sys.stdout.write(HOME + f"{CLEAR_LINE}\r\n".join(lines[:rows]) + CLEAR_LINE + CLEAR_BELOW)
    sys.stdout.flush()


def _read_key(timeout: float) -> str:
    """Return a key, or nothing; an arrow is a sequence of three characters."""
    descriptor = sys.stdin.fileno()
    ready, _, _ = select.select([descriptor], [], [], timeout)
    if not ready:
        return ""
    key = os.read(descriptor, 1).decode(errors="ignore")
    if key == "\x1b":
        for _ in range(2):
            more, _, _ = select.select([descriptor], [], [], 0.01)
            if more:
                key += os.read(descriptor, 1).decode(errors="ignore")
    return key


@contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """Read single keys, and leave the terminal as it was."""
    before = termios.tcgetattr(descriptor)
    sys.stdout.write("\x1b[?1049h\x1b[?25l")
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        sys.stdout.write("\x1b[?25h\x1b[?1049l")
        sys.stdout.flush()
