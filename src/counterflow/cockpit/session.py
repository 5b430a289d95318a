"""One environment, one driver: what happens between a key press and a recorded episode. No threads, no clock, no network.

A session is advanced from outside: `advance(now)` executes at most one action. Between two calls it takes in reports and
commands. It runs in whatever thread its owner likes, but in one; trainings and the keeping of episodes go to `background`.

What it is made of has each its own module: what is driven (`targets`), where (`simulator`), how (`helm`, with the
`noise_policies`), by whom (`control`, `pilots`), what was driven (`episode`), what is kept of it (`recordings`, `tallies`), and
what is seen (`picture`). The session says what comes after what.

States: "driving" (moves as long as somebody wants it to), "paused", "finished" (the episode is over; it can be kept or
discarded), "failed" (the simulator died; `restart` brings a new one).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from counterflow.cockpit.background import Background, Chores, Daemons, Here
from counterflow.cockpit.control import Control
from counterflow.cockpit.episode import Chunk, Episode
from counterflow.cockpit.helm import Helm
from counterflow.cockpit.noise_policies import NoisePolicies
from counterflow.cockpit.picture import Frame, Picture
from counterflow.cockpit.pilots import MakeReasoner, Pilots
from counterflow.cockpit.recordings import Recordings
from counterflow.cockpit.settings import SessionSettings
from counterflow.cockpit.simulator import MakeEnv, Simulator
from counterflow.cockpit.tallies import Tallies
from counterflow.cockpit.targets import Target, open_target
from counterflow.cockpit.training import POLICIES
from counterflow.envs import CameraView, EnvSpec
from counterflow.errors import CounterflowError, InvalidInputError, UnknownNameError, WorkerError
from counterflow.experiments.sight import check_fit
from counterflow.random import child_seed
from counterflow.reasoners.words import ways_of
from counterflow.steering import ChunkCritic

__all__ = ["Session", "SessionSettings"]

State = Literal["driving", "paused", "finished", "failed"]


class Session:
    """Drives one environment.

    Args:
        settings: what and how.
        background: where trainings and the keeping of episodes are done; None: right here.
        reasoners: who can be handed over to, by name, besides "script": functions that make one, given the task's name.
        make: makes the environment.
        questions: where a pilot that may take seconds is asked; None: in threads that nobody waits for (right here without a
            `background`).

    Raises:
        CounterflowError: the task is unknown, or the policy can't drive it, or this machine can't draw.
    """

    def __init__(
        self,
        settings: SessionSettings,
        background: Background | None = None,
        reasoners: Mapping[str, MakeReasoner] | None = None,
        make: MakeEnv | None = None,
        questions: Background | None = None,
    ) -> None:
        if questions is None:
            questions = Here() if background is None else Daemons()
        self.settings = settings
        self.state: State = "paused"
        self.reason = ""
        self.notes: deque[dict[str, Any]] = deque(maxlen=20)
        self._noted = 0
        self.chores = Chores(Here() if background is None else background, self.note)
        self.simulator = Simulator(settings, make)
        self.pilots = Pilots({} if reasoners is None else reasoners, questions)
        critic = None if settings.critic is None else ChunkCritic.load(settings.critic, settings.device)
        self.target: Target = open_target(
            settings.policy, settings.env, settings.device, settings.steering.reversal_steps, critic, self.note
        )
        self.picture = Picture(self.target, self.simulator, questions)
        self.chunk: Chunk | None = None
        self._next_index = 0
        try:
            self.noise_policies = NoisePolicies(settings, self.target)
            self.helm = Helm(settings, self.target, self.noise_policies)
            self.tallies = Tallies(settings.out / "tallies.json")
            self.recordings = Recordings(settings.out, settings.seed, self.target)
            self._open(settings.env)
            self._begin()
        except BaseException:
            self._let_go()
            raise
        self.state = "paused"

    # What is reported and commanded

    def pause(self, reason: str = "") -> None:
        """Stand still until `resume`."""
        self.control.let_go()
        self._end_chunk()
        if self.state == "driving":
            self.state, self.reason = "paused", reason

    def resume(self) -> None:
        """Drive on."""
        if self.state == "paused":
            self.state, self.reason = "driving", ""

    def begin(self) -> None:
        """Begin a new episode. One that was driven and isn't over counts as failed; one that is over is kept, if undecided."""
        if self.state == "failed":
            self.restart()
            return
        self._close_episode()
        self._begin()

    def keep(self) -> None:
        """Keep the finished episode in the dataset. It is on disk some moments later.

        Raises:
            MismatchError: nobody knows the noises of what was driven.
        """
        if self.state != "finished" or self.episode.kept:
            return
        self.recordings.check()
        self.episode.kept = "kept"
        self.chores.begin("keep", self._keep, self.episode)

    def discard(self) -> None:
        """Leave the finished episode out of the dataset. It stays in the tallies."""
        if self.state == "finished" and not self.episode.kept:
            self.episode.kept = "discarded"

    def choose(
        self,
        *,
        method: str | None = None,
        reversal_steps: int | None = None,
        steps: int | None = None,
        tau: float | None = None,
        candidates: int | None = None,
        magnitude: float | None = None,
        noise_policy: str | None = None,
        pilot: str | None = None,
    ) -> None:
        """Change how it is driven, from the next chunk on. What isn't given stays.

        Args:
            method: one of `METHODS`.
            reversal_steps: K of FRS.
            steps: denoising steps of the others.
            tau: of partial noising.
            candidates: of sample-and-rank.
            magnitude: length of the reference's motion.
            noise_policy: the name of one that was learned here or loaded.
            pilot: who drives when no key is held: "policy", "script", "vlm" (where there is one), or "" for nobody.

        Raises:
            UnknownNameError, InvalidInputError, MismatchError: a value can't be right; nothing has changed.
        """
        choice = self.helm.changed(
            method=method,
            magnitude=magnitude,
            noise_policy=noise_policy,
            reversal_steps=reversal_steps,
            steps=steps,
            tau=tau,
            candidates=candidates,
        )
        if pilot is not None:
            self.hand_over(pilot)  # the last that can fail
        self.helm.choice = choice

    def hand_over(self, pilot: str) -> None:
        """Let somebody drive while no key is held: "policy", a reasoner's name, or nobody ("").

        Raises:
            UnknownNameError: nobody of that name; MissingDependencyError and others: who was meant can't come; nothing has
                changed.
        """
        self.pilots.hand_over(pilot, self.env_name, self.episode.seed)
        self.control.pilot = self.pilots.name is not None

    def go_to(self, env: str) -> None:
        """Go to another task of the family.

        Raises:
            UnknownNameError: it is none.
        """
        if env not in self.tasks:
            raise UnknownNameError("task of this family", env, self.tasks)
        self._close_episode()
        self._reopen(env)

    def restart(self) -> None:
        """Start the simulator anew; the episode in which it died is lost."""
        self.episode.closed = True
        self._reopen(self.env_name)

    def start_training(self) -> None:
        """Train a noise policy on what was recorded of this task.

        Raises:
            InvalidInputError: a training runs already.
            MismatchError: nobody knows the noises of what was driven.
        """
        training = self.noise_policies.prepare()
        self.chores.begin("train", self.noise_policies.train, training, self.env_name, self.helm.noise_policy)

    def stop_training(self) -> None:
        """Stop the training."""
        self.noise_policies.stop_training()

    def export_video(self) -> None:
        """Write a film of this episode, as far as it is, into the run's folder."""
        if not self.episode.shots:
            raise InvalidInputError("there is nothing to film yet; drive first.")
        episode = replace(self.episode, shots=list(self.episode.shots))
        self.chores.begin("film", self._write_film, episode, self.simulator.camera, self.simulator.spec)

    # What happens

    def advance(self, now: float) -> bool:
        """Execute one action, if somebody wants motion; return whether one was executed."""
        self.chores.take_in()
        self.picture.take_samples()
        if self.state != "driving":
            return False
        try:
            if self.chunk is not None and not self.control.goes_on(self.chunk.wish, now):
                self._end_chunk()
            if self.chunk is None:
                wish = self.control.wish(now)
                if wish is None:
                    return False
                direction = wish.direction
                if direction is None:
                    direction = self.pilots.ask(self.simulator, self.episode.steps)
                if direction is None:
                    return False  # the pilot is still thinking; whoever drives is heard meanwhile
                chunk = self.helm.decide(wish, direction, self.simulator.batch.observation, self.episode)
                self.picture.draw_plan(chunk.plan, wish.sequence)
                self.chunk = chunk
                if wish.kind == "pilot" and self.pilots.reasoner is not None:
                    return False  # that may have taken long: first hear whether it is still wanted
            self._execute(self.chunk)
        except WorkerError as error:
            self._fail(error)
        except CounterflowError as error:  # of a policy or a reasoner: the episode can be gone on with
            self.chunk = None
            self.note(str(error), "error")
            self.pause(str(error))
        return True

    def _execute(self, chunk: Chunk) -> None:
        """Execute the next action of a chunk."""
        index, simulator, episode = len(chunk.rewards), self.simulator, self.episode
        chunk.seen.append(simulator.batch.observation[0])
        simulator.execute(chunk.actions[index])
        chunk.rewards.append(float(simulator.batch.rewards[0, 0]))
        episode.steps += 1
        episode.success = episode.success or bool(simulator.batch.success[0])
        self._show(simulator.batch.frames[0][-1], chunk)
        if index == 0:  # after the first action has gone, so that the key was answered by then
            self.picture.draw_fan(chunk.observation, self.helm.choice.steering, episode.steps)
        over = bool(simulator.batch.done[0])
        if over or index + 1 == len(chunk.actions):
            self._end_chunk()
        if over:
            self._finish()

    def _show(self, image: npt.NDArray[np.uint8], chunk: Chunk | None) -> None:
        jpeg = self.picture.show(image, self.episode.steps)
        self.episode.film(jpeg, chunk, self.effector)

    def _end_chunk(self) -> None:
        """Note the decision as far as it was executed."""
        chunk, self.chunk = self.chunk, None
        if chunk is not None:
            self.episode.add(chunk)

    def _finish(self) -> None:
        self.state = "finished"
        self.reason = "success" if self.episode.success else "out of time"
        self.control.let_go()
        self._count_outcome(success=self.episode.success)

    def _fail(self, error: CounterflowError) -> None:
        self.state, self.reason = "failed", str(error)
        self.chunk = None
        self.note(str(error), "error")

    # From one episode, and one simulator, to the next

    def _begin(self) -> None:
        index = self._next_index
        self._next_index += 1
        self.episode = Episode(self.env_name, child_seed(self.settings.seed, "cockpit", index), index)
        self.chunk = None
        self.picture.clear()
        self.pilots.begin(self.env_name, self.episode.seed)
        try:
            self.simulator.reset(child_seed(self.episode.seed, "environment"))
            self._show(self.simulator.render(), None)
        except WorkerError as error:
            self._fail(error)
            return
        self.control.let_go()
        self.state, self.reason = "driving", ""

    def _close_episode(self) -> None:
        """Leave an episode behind: kept if it is over, a failure if it was given up, nothing if it was never driven."""
        if self.episode.closed:
            return
        if self.state == "finished":
            self._keep_undecided()
        else:
            self._end_chunk()
            if self.episode.decisions:
                self._count_outcome(success=False)
        self.episode.closed = True

    def _keep_undecided(self) -> None:
        if self.target.binding is not None:
            self.keep()

    def _count_outcome(self, *, success: bool) -> None:
        try:
            self.tallies.add(self.episode.outcome(success=success))
        except CounterflowError as error:
            self.note(str(error), "error")

    def _open(self, env: str) -> None:
        """Start a task's simulator, and turn everybody to the task."""
        self.simulator.open(env)
        self.chores.wait_for("keep")  # noises are found with the policy as it was told of that episode's task
        self.target.fit(self.simulator.spec)
        check_fit(self.target, self.simulator.spec)
        self._next_index = max(self.tallies.next_index, self._next_index)
        self.simulator.stand()
        layout = self.target.action_spec.layout
        self.control = Control(
            ways_of(self.simulator.camera.rotation),
            self.settings.stale_after,
            "open" if layout is not None and layout.gripper is not None else "policy",
            pilot=self.pilots.name is not None,
        )
        self.recordings.count(env)

    def _reopen(self, env: str) -> None:
        try:
            self._open(env)
        except CounterflowError as error:
            self._fail(error)
            return
        if self.pilots.name is not None:
            self.hand_over(self.pilots.name)
        self._begin()

    # In the background

    def _keep(self, episode: Episode) -> str:
        try:
            self.recordings.add(episode)
            self.recordings.count(self.env_name)
        except BaseException:
            episode.kept = ""  # a full disk, or a folder that somebody else writes to: it can be tried again
            raise
        return f"episode {episode.index} is kept ({'success' if episode.success else 'failure'})"

    def _write_film(self, episode: Episode, camera: CameraView, spec: EnvSpec) -> str:
        from counterflow.cockpit.filming import write_film

        path = self.settings.out / "videos" / f"episode-{episode.index}.mp4"
        write_film(path, episode.shots, camera, spec.max_episode_steps, episode.success, spec.task)
        return f"{path.name} is written"

    # What is shown

    def note(self, text: str, kind: str = "info") -> None:
        """Say something to everybody who watches."""
        self._noted += 1
        self.notes.append({"number": self._noted, "kind": kind, "text": text[:600]})

    def describe(self) -> dict[str, Any]:
        """Return everything but the picture, as plain values."""
        spec, training = self.simulator.spec, self.noise_policies.training
        return {
            "env": self.env_name,
            "task": spec.task,
            "tasks": self.tasks,
            "state": self.state,
            "moving": self.is_moving,
            "reason": self.reason,
            "episode": {**self.episode.describe(), "max_steps": spec.max_episode_steps},
            "rate": self.settings.rate,
            **self.helm.describe(),
            "gripper": self.control.gripper,
            **self.pilots.describe(),
            "tallies": self.tallies.of(self.env_name),
            "dataset": self.recordings.counts,
            "training": None if training is None else training.to_json(),
            "busy": self.chores.busy,
            "exports": self.exports(),
            "notes": list(self.notes),
            "stale_after": self.settings.stale_after,
        }

    def exports(self) -> list[str]:
        """Return what there is to download, by its path in the run's folder."""
        out = self.settings.out
        found = [
            *(out / POLICIES).glob("*.safetensors"),
            *(out / POLICIES).glob("*.json"),
            *(out / "videos").glob("*.mp4"),
        ]
        return sorted(str(path.relative_to(out)) for path in found if not path.name.startswith("."))

    def close(self) -> None:
        """End the simulator; an undecided episode that is over is kept."""
        if self.state == "finished":
            self._keep_undecided()
        self.stop_training()
        self._let_go()

    def _let_go(self) -> None:
        self.target.close()
        self.simulator.close()

    @property
    def is_moving(self) -> bool:
        """Whether a chunk is being executed."""
        return self.chunk is not None

    @property
    def env_name(self) -> str:
        """The task."""
        return self.simulator.name

    @property
    def tasks(self) -> list[str]:
        """The tasks of this family."""
        return self.simulator.tasks

    @property
    def pilot(self) -> str | None:
        """Who drives while no key is held; None: nobody."""
        return self.pilots.name

    @property
    def frame(self) -> Frame | None:
        """The newest picture."""
        return self.picture.frame

    @property
    def effector(self) -> npt.NDArray[np.float64]:
        """Where the gripper is, (3,) metres."""
        return self.simulator.effector
