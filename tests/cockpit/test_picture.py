"""What is seen while driving."""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image

from counterflow.cockpit.session import Session

MakeSession = Callable[..., Session]
Hold = Callable[..., float]


def test_pictures_and_paths(make_session: MakeSession, hold: Hold) -> None:
    session = make_session()
    session.resume()
    hold(session, "left", actions=3)
    frame = session.frame
    assert frame is not None
    assert Image.open(io.BytesIO(frame.jpeg)).size == (64, 64)
    (reference,), (chunk,) = frame.overlay["reference"], frame.overlay["chunk"]
    assert reference[-1][0] < reference[0][0] - 0.02  # to the left in the picture
    assert len(reference) == len(chunk) == 6
    assert len(frame.overlay["fan"]) == 12
    assert all(0 <= value <= 1 for value in frame.overlay["gripper"])
    assert abs(frame.overlay["agreement"]) <= 1
