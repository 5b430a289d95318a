"""How much of a task is left, from the simulator's own account: what tells whether somebody gets anywhere."""

from __future__ import annotations

import numpy as np

from counterflow.reasoners.direction import View

WRONG_BUTTON = 0.2  # what a button that is in the wrong state counts for, metres
FAR = 0.04  # an object this near to its goal is in its place, metres


def remaining(view: View) -> float:
    """Return what is left to do, in metres; it falls as a task is being solved, and is 0 when all is in its place.

    It adds up how far objects and slides are from their goals, what buttons in a wrong state count for, and how far the
    gripper is from the nearest thing that is out of place (so that approaching something counts, too).

    Args:
        view: the simulator's account (`Batch.view`).
    """
    left, places = 0.0, []
    if "privileged/remaining" in view:  # some environments keep an account of their own
        left += float(view["privileged/remaining"][0])
    for name in view:
        if name.startswith("goal/block_"):
            position = view[name.replace("goal/", "privileged/")]
            distance = float(np.linalg.norm(position - view[name]))
            if distance > FAR:
                left += distance
                places.append(position)
    for slide in ("drawer", "window"):
        if f"goal/{slide}_pos" in view:
            distance = abs(float(view[f"privileged/{slide}_pos"][0] - view[f"goal/{slide}_pos"][0]))
            if distance > FAR:
                left += distance
                places.append(view[f"privileged/{slide}_handle_pos"])
    if "goal/button_states" in view:
        wrong = np.flatnonzero(view["privileged/button_states"] != view["goal/button_states"])
        left += WRONG_BUTTON * len(wrong)
        places += [view[f"privileged/button_{button}_top_pos"] for button in wrong]
    if not places:
        return left
    return left + float(np.linalg.norm(np.stack(places) - view["proprio/effector_pos"], axis=1).min())
