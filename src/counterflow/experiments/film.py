"""Filming an episode twice, side by side: the policy alone, and steered, with the direction drawn into the frame."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import accumulate
from pathlib import Path

from counterflow.checks import COUNT
from counterflow.envs import CameraView, EnvSpec, RenderSettings, VectorEnv, make_env
from counterflow.errors import InvalidInputError
from counterflow.experiments.evaluate import ReasonerSettings, load_prior
from counterflow.experiments.panels import Arrow, Panel, Status, side_by_side
from counterflow.experiments.rollout import Episode, run_episodes
from counterflow.experiments.video import video_writer
from counterflow.policies import BasePolicy
from counterflow.random import check_seed, child_seed
from counterflow.reasoners import Direction
from counterflow.steering import MethodSettings, steer

FRAMES_PER_SECOND = 20.0
GIF_SPEED = 3.0  # how much faster a moving picture plays: readers scroll on
ARROW = 0.16  # metres
HOLD = 30  # frames for which the end is shown
LEAST_SIZE = 64  # pixels
AT_ONCE = 8  # episodes tried side by side when one is chosen
WORDS = (("right", "left"), ("up", "down"), ("nearer", "farther"))  # as seen through the camera
CLEARLY = 0.8  # share of the largest component that makes a second one worth a word


def film(
    env: str,
    path: Path | str,
    *,
    method: str = "frs",
    seed: int = 0,
    gif: Path | str | None = None,
    render: RenderSettings | None = None,
    tries: int = 16,
    policy: str | None = None,
    settings: MethodSettings | None = None,
    reasoner: ReasonerSettings | None = None,
) -> Path:
    """Film one episode: left the policy alone, right steered, both from the same beginning.

    Args:
        env: the task's full name.
        path: where the film goes (.mp4).
        method: how the right side is steered.
        seed: what the episode descends from.
        gif: where a small moving picture goes as well.
        render: size and quality of the frames.
        tries: how many episodes to try, without drawing, for one where the policy alone fails and the steered one
            succeeds; 1 films the first.
        policy: a checkpoint; None: the shipped prior.
        settings: of the method.
        reasoner: who gives the directions.

    Returns:
        The film's path.

    Raises:
        RenderingError: this machine can't draw.
        MissingDependencyError: there is no ffmpeg.
        StorageError: the film can't be written.
        InvalidInputError, UnknownNameError, MismatchError: an argument can't be right.
    """
    COUNT.check("tries", tries)
    render = RenderSettings(384, 384) if render is None else render
    if min(render.width, render.height) < LEAST_SIZE:
        raise InvalidInputError(
            f"a side is {render.width} x {render.height} pixels; expected at least {LEAST_SIZE} each way, so that what "
            "is drawn into it can be read."
        )
    reasoner = ReasonerSettings() if reasoner is None else reasoner
    prior = load_prior(env, policy)
    with ExitStack() as writers:
        # Opened first: what is wrong with a path or with ffmpeg shows before minutes of simulation.
        films = [writers.enter_context(video_writer(path, FRAMES_PER_SECOND))]
        if gif is not None:
            films.append(writers.enter_context(video_writer(gif, FRAMES_PER_SECOND, loop_speed=GIF_SPEED)))
        with make_env(env, 1, workers=0, render=render) as stage:
            stage.reset([0])
            stage.render()  # a machine that can't draw says so now
            chosen = _choose(env, prior, method, check_seed(seed), tries, settings, reasoner)
            steered = _shoot(stage, prior, method, chosen, settings, reasoner, None)
            # What the policy alone does after the steered one is done is of no interest.
            alone = _shoot(stage, prior, "base", chosen, settings, reasoner, steered.chunks)
            view = stage.camera()
            sides = [
                _panels(alone, stage.spec, view, "base"),
                _panels(steered, stage.spec, view, method),
            ]
            for image in side_by_side(sides, heading=stage.spec.task, hold=HOLD):
                for write in films:
                    write(image)
    return Path(path)


def _choose(
    env: str,
    prior: BasePolicy,
    method: str,
    seed: int,
    tries: int,
    settings: MethodSettings | None,
    reasoner: ReasonerSettings,
) -> int:
    """Return the seed of the first episode that shows the difference, else of the first that the steered policy solves."""
    seeds = [child_seed(seed, "film", index) for index in range(tries)]
    if tries == 1:
        return seeds[0]
    solved: list[int] = []
    with make_env(env, min(AT_ONCE, tries), render=reasoner.render) as rehearsal:
        for first in range(0, tries, AT_ONCE):
            batch = seeds[first : first + AT_ONCE]
            convention = reasoner.writing()
            steered = run_episodes(
                steer(prior, method, settings), rehearsal, batch, reasoner.maker(env), convention=convention
            )
            succeeded = [episode.seed for episode in steered if episode.success]
            solved += succeeded
            if not succeeded:
                continue
            alone = run_episodes(steer(prior, "base", settings), rehearsal, succeeded)
            failed = [episode.seed for episode in alone if not episode.success]
            if failed:
                return failed[0]
    return solved[0] if solved else seeds[0]


def _shoot(
    stage: VectorEnv,
    prior: BasePolicy,
    method: str,
    seed: int,
    settings: MethodSettings | None,
    reasoner: ReasonerSettings,
    max_chunks: int | None,
) -> Episode:
    make_reasoner = None if method == "base" else reasoner.maker(stage.spec.name)
    episodes = run_episodes(
        steer(prior, method, settings),
        stage,
        [seed],
        make_reasoner,
        convention=reasoner.writing(),
        film=True,
        max_chunks=max_chunks,
    )
    return episodes[0]


def _panels(episode: Episode, spec: EnvSpec, view: CameraView, method: str) -> Iterator[Panel]:
    """Return a panel for each frame: the first before any step, the others after one each."""
    chunk_of = [chunk for chunk, steps in enumerate(episode.chunk_steps) for _ in range(steps)]
    ends = [*accumulate(episode.chunk_steps)]
    last = len(episode.frames) - 1
    ended: Status = "failure" if episode.steps >= spec.max_episode_steps else "unfinished"
    for step, frame in enumerate(episode.frames):
        # A frame belongs to the chunk that is being executed; the first to the chunk that is about to be.
        chunk = chunk_of[min(max(step - 1, 0), ends[-1] - 1)]
        direction = episode.directions[chunk]
        status: Status = "running" if step < last else ("success" if episode.success else ended)
        yield Panel(
            frame,
            title=method,
            caption=describe(direction, view) if method != "base" else "nobody says anything",
            arrow=None if method == "base" else _arrow(direction, episode, chunk, view),
            gripper=None if method == "base" or direction.defer else direction.gripper,
            step=step,
            max_steps=spec.max_episode_steps,
            status=status,
        )


def describe(direction: Direction, view: CameraView) -> str:
    """Say a direction in the words of somebody who looks through the camera."""
    if direction.defer:
        return "(defers)"
    seen = view.rotation.T @ direction.vector  # along the camera's right, up and backward axes
    ways = [
        WORDS[axis][0 if seen[axis] > 0 else 1] for axis in range(3) if abs(seen[axis]) > CLEARLY * abs(seen).max() > 0
    ]
    amount = ", less" if direction.amount < 1 else ""
    gripper = {"policy": "", "hold": "hold", "open": "gripper open", "close": "gripper close"}[direction.gripper]
    return ", ".join(part for part in (" and ".join(ways) + amount if ways else "stay", gripper) if part)


def _arrow(direction: Direction, episode: Episode, chunk: int, view: CameraView) -> Arrow | None:
    """Return the direction as an arrow at the gripper, or None where there is none to draw."""
    if not direction.vector.any():
        return None
    start = episode.moments[chunk]
    pixels = view.project([start, start + ARROW * direction.vector])
    towards = float((direction.vector / (direction.vector**2).sum() ** 0.5) @ view.rotation[:, 2])
    (x0, y0), (x1, y1) = pixels.tolist()
    return Arrow((x0, y0), (x1, y1), towards=max(-1.0, min(1.0, towards)))
