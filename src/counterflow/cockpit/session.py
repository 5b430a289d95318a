"""One environment, one driver: what happens between a key press and a recorded episode. No threads, no clock, no network.

A session is advanced from outside: `advance(now)` executes at most one action. Between two calls it takes in reports and
commands. It runs in whatever thread its owner likes, but in one; trainings and the keeping of episodes go to `background`.

States: "driving" (moves as long as somebody wants it to), "paused", "finished" (the episode is over; it can be kept or
discarded), "failed" (the simulator died; `restart` brings a new one).
"""

from __future__ import annotations

import io
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from counterflow.cockpit.background import Background, Daemons, Here
from counterflow.cockpit.control import Control, Wish
from counterflow.cockpit.overlay import executable, paths_of
from counterflow.cockpit.tallies import MIXED, Outcome, Tallies
from counterflow.cockpit.targets import METHODS, Decided, Target, open_target
from counterflow.cockpit.training import CORRECTIONS, POLICIES, RECORDINGS, Training, train
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.envs import Batch, CameraView, EnvSpec, RenderSettings, VectorEnv, env_names, family_of, make_env
from counterflow.errors import CounterflowError, InvalidInputError, MismatchError, UnknownNameError, WorkerError
from counterflow.experiments.evaluate import ReasonerSettings
from counterflow.experiments.record import arrays_of
from counterflow.experiments.rollout import Decision, seen_by
from counterflow.experiments.sight import check_fit
from counterflow.learning.dsbc import DSBCConfig
from counterflow.policies import BasePolicy
from counterflow.random import RowGenerators, check_seed, child_seed
from counterflow.reasoners import Convention, Direction, Reasoner, scripted_reasoner, to_reference
from counterflow.reasoners.words import ways_of
from counterflow.steering import ChunkCritic, ChunkRegressor, MethodSettings, Plan, Reference

State = Literal["driving", "paused", "finished", "failed"]
QUALITY = 82  # of the pictures, JPEG
MOST_ABANDONED = 3  # questions that nobody waits for any more and that aren't answered yet; beyond it none is asked
MOST_FRAMES = 4000  # of an episode's film
UNKNOWN_NOISES = "what drives tells nothing of the noises of its flow, so there is nothing to learn from"
HELPING = ("frs", "rank", "direct")
"""How somebody helps a noise policy: by the first of these that there is."""


@dataclass(frozen=True)
class SessionSettings:
    """What a session drives, and how.

    Attributes:
        env: the task; others of its family can be chosen later.
        out: the run's folder.
        policy: the frozen policy: its name or path, a server's address (serve://host:port), or the object itself; None: the
            shipped prior of the task's family.
        noise_policy: what 'counterflow distill' wrote, to drive with it at once.
        critic: what 'counterflow critic' wrote, for "guided".
        seed: what every episode descends from.
        method: how references are followed at first; None: FRS, or what a server does.
        steering: of the methods; K of the noises that are recorded is `steering.reversal_steps`, or a server's own.
        convention: how a direction is written into a chunk.
        magnitude: overrides the convention's.
        stale_after: seconds after which the driver's report no longer counts.
        rate: actions a second.
        size: height and width of the picture, pixels.
        workers: simulator processes; 1, or 0 for none.
        device: where the policy computes.
        distillation: settings of the training.

    Raises:
        InvalidInputError: a number is out of range.
        UnknownNameError: there is no such method.
    """

    env: str
    out: Path
    policy: str | BasePolicy | None = None
    noise_policy: Path | None = None
    critic: Path | None = None
    seed: int = 0
    method: str | None = None
    steering: MethodSettings = field(default_factory=MethodSettings)
    convention: str = "ogbench"
    magnitude: float | None = None
    stale_after: float = 0.6
    rate: float = 20.0
    size: int = 256
    workers: int = 1
    device: str = "cpu"
    distillation: DSBCConfig = field(default_factory=DSBCConfig)

    def __post_init__(self) -> None:
        """Check names and numbers."""
        if self.method is not None and self.method not in METHODS:
            raise UnknownNameError("method", self.method, METHODS)
        if not 1 <= self.rate <= 200:
            raise InvalidInputError(f"rate is {self.rate!r}; expected 1 to 200 actions a second.")
        if not 64 <= self.size <= 1024:
            raise InvalidInputError(f"size is {self.size!r}; expected 64 to 1024 pixels.")
        check_seed(self.seed)
        ReasonerSettings(convention=self.convention, magnitude=self.magnitude).writing()


@dataclass(frozen=True)
class Frame:
    """A picture and what is drawn over it.

    Attributes:
        number: it only grows.
        jpeg: the picture.
        overlay: paths in shares of width and height: "reference", "fan", "chunk", and where the gripper is, "gripper".
        step: environment steps so far.
        sequence: number of the last report of the driver's that moved the robot.
    """

    number: int
    jpeg: bytes
    overlay: dict[str, Any]
    step: int
    sequence: int


@dataclass
class _Chunk:
    """A chunk that is being executed."""

    wish: Wish
    direction: Direction
    plan: Plan
    method: str
    reusable: bool
    intervened: bool
    observation: npt.NDArray[np.float32]
    actions: npt.NDArray[np.float32]
    base: Plan
    seen: list[npt.NDArray[np.float32]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)


@dataclass
class _Shot:
    """A frame of the film."""

    jpeg: bytes
    method: str
    direction: Direction | None
    effector: npt.NDArray[np.float64]


@dataclass
class _Episode:
    """What was driven so far."""

    env: str
    seed: int
    index: int
    decisions: list[Decision] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)
    reusable: list[bool] = field(default_factory=list)
    shots: list[_Shot] = field(default_factory=list)
    success: bool = False
    steps: int = 0
    kept: Literal["", "kept", "discarded"] = ""
    closed: bool = False

    @property
    def method(self) -> str:
        """How it was driven, in a word."""
        used = set(self.methods)
        if "dsbc" in used:
            helped = any(one.intervened for one in self.decisions)
            return "dsbc+help" if helped or len(used) > 1 else "dsbc"
        return used.pop() if len(used) == 1 else MIXED


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
        reasoners: Mapping[str, Callable[[str], Reasoner]] | None = None,
        make: Callable[[SessionSettings], VectorEnv] | None = None,
        questions: Background | None = None,
    ) -> None:
        self.settings = settings
        if questions is None:
            questions = Here() if background is None else Daemons()
        self._questions: Background = questions
        self._background: Background = Here() if background is None else background
        self._make = _make_env if make is None else make
        self._env: VectorEnv | None = None
        self.state: State = "paused"
        self.training: Training | None = None
        self._reasoners: dict[str, Callable[[str], Reasoner]] = {"script": scripted_reasoner, **(reasoners or {})}
        critic = None if settings.critic is None else ChunkCritic.load(settings.critic, settings.device)
        self.notes: deque[dict[str, Any]] = deque(maxlen=20)
        self._noted = 0
        self.target: Target = open_target(
            settings.policy, settings.env, settings.device, settings.steering.reversal_steps, critic, self.note
        )
        try:
            self._begin(settings)
        except BaseException:
            self.close()
            raise

    def _begin(self, settings: SessionSettings) -> None:
        self.method = self.target.preferred if settings.method is None else settings.method
        self.steering, self.magnitude = settings.steering, settings.magnitude
        self.learned: dict[str, ChunkRegressor] = {}
        self.noise_policy: str | None = None
        self._load_learned()
        self.tallies = Tallies(settings.out / "tallies.json")
        self.pilot: str | None = None
        self._pending: list[tuple[str, Future[Any]]] = []
        self._counts: dict[str, Any] = {}
        self._writing = threading.Lock()  # a dataset lets one write at a time, of the same process, too
        self._sampling: tuple[Future[npt.NDArray[np.float32]], npt.NDArray[np.float64], dict[str, Any]] | None = None
        self.frame: Frame | None = None
        self.reason = ""
        self.env_name = settings.env
        self._reasoner: Reasoner | None = None
        self._question: tuple[Future[Direction], int] | None = None  # what the pilot is asked, and at which step it was
        self._abandoned: list[Future[Direction]] = []
        self._chunk: _Chunk | None = None
        self._open()
        self._count_recordings()
        self.begin()
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
        index = self._next_index
        self._next_index += 1
        seed = child_seed(self.settings.seed, "cockpit", index)
        self._episode = _Episode(self.env_name, seed, index)
        self._noise = RowGenerators([child_seed(seed, "policy")])
        self._chunk = None
        self._drawn: dict[str, Any] = {}
        self._sequence = 0
        self._reset_reasoner()
        try:
            self._batch = self._require_env().reset([child_seed(seed, "environment")])
            self._show(self._require_env().render(), None)
        except WorkerError as error:
            self._fail(error)
            return
        self.control.let_go()
        self.state, self.reason = "driving", ""

    def keep(self) -> None:
        """Keep the finished episode in the dataset. It is on disk some moments later.

        Raises:
            MismatchError: nobody knows the noises of what was driven.
        """
        if self.state != "finished" or self._episode.kept:
            return
        if self.target.binding is None:
            raise MismatchError(f"this episode can't be kept: {UNKNOWN_NOISES}.")
        self._episode.kept = "kept"
        self._later("keep", self._keep, self._episode)

    def discard(self) -> None:
        """Leave the finished episode out of the dataset. It stays in the tallies."""
        if self.state == "finished" and not self._episode.kept:
            self._episode.kept = "discarded"

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
        given: dict[str, Any] = {"reversal_steps": reversal_steps, "steps": steps, "tau": tau, "candidates": candidates}
        steering = replace(self.steering, **{name: value for name, value in given.items() if value is not None})
        chosen = noise_policy or self.noise_policy or next(reversed(self.learned), None)
        if noise_policy is not None and noise_policy not in self.learned:
            raise UnknownNameError("noise policy", noise_policy, self.learned)
        wanted = self.method if method is None else method
        if wanted not in METHODS:
            raise UnknownNameError("method", wanted, METHODS)
        for name, value in given.items():
            if value is not None and name not in self.target.settings:
                raise InvalidInputError(f"{name} is set where the policy runs ({self.target.about}), not here.")
        self.target.check(steering)
        if magnitude is not None:
            ReasonerSettings(convention=self.settings.convention, magnitude=magnitude).writing()
        if pilot is not None and pilot not in ("", "policy", *self._reasoners):
            raise UnknownNameError("pilot", pilot, ("policy", *self._reasoners))
        if lacking := self._lacks(wanted):
            raise InvalidInputError(f"{wanted!r} can't be chosen: {lacking}.")
        if wanted == "dsbc":
            self.target.check_learned(self.learned[str(chosen)])
        if pilot is not None:
            self.hand_over(pilot)  # the last that can fail
        self.steering, self.noise_policy, self.method = steering, chosen, wanted
        self.magnitude = self.magnitude if magnitude is None else magnitude

    def hand_over(self, pilot: str) -> None:
        """Let somebody drive while no key is held: "policy", a reasoner's name, or nobody ("").

        Raises:
            UnknownNameError: nobody of that name; MissingDependencyError and others: who was meant can't come; nothing has
                changed.
        """
        if pilot not in ("", "policy", *self._reasoners):
            raise UnknownNameError("pilot", pilot, ("policy", *self._reasoners))
        reasoner = self._reasoners[pilot](self.env_name) if pilot in self._reasoners else None
        self._abandon_question()
        self._reasoner = reasoner
        self.pilot = pilot or None
        self.control.pilot = self.pilot is not None
        self._reset_reasoner()

    def go_to(self, env: str) -> None:
        """Go to another task of the family.

        Raises:
            UnknownNameError: it is none.
        """
        if env not in self.tasks:
            raise UnknownNameError("task of this family", env, self.tasks)
        self._close_episode()
        self.env_name = env
        self._reopen()

    def restart(self) -> None:
        """Start the simulator anew; the episode in which it died is lost."""
        self._episode.closed = True
        self._reopen()

    def start_training(self) -> None:
        """Train a noise policy on what was recorded of this task.

        Raises:
            InvalidInputError: a training runs already.
            MismatchError: nobody knows the noises of what was driven.
        """
        if self.target.binding is None:
            raise MismatchError(f"there can be no training: {UNKNOWN_NOISES}.")
        if self.training is not None and self.training.state == "running":
            raise InvalidInputError("a training is running; wait for it, or stop it.")
        number = 1
        while (self.settings.out / POLICIES / f"noise-policy-{number}.safetensors").exists():
            number += 1
        self.training = Training(f"noise-policy-{number}")
        initial = self.learned.get(self.noise_policy or "")
        self._later("train", self._train, self.training, self.env_name, initial)

    def stop_training(self) -> None:
        """Stop the training."""
        if self.training is not None:
            self.training.stop.set()

    def export_video(self) -> None:
        """Write a film of this episode, as far as it is, into the run's folder."""
        if not self._episode.shots:
            raise InvalidInputError("there is nothing to film yet; drive first.")
        episode = replace(self._episode, shots=list(self._episode.shots))
        self._later("film", self._write_film, episode, self.camera, self.spec)

    # What happens

    def advance(self, now: float) -> bool:
        """Execute one action, if somebody wants motion; return whether one was executed."""
        self._take_in()
        self._take_samples()
        if self.state != "driving":
            return False
        try:
            if self._chunk is not None and not self.control.goes_on(self._chunk.wish, now):
                self._end_chunk()
            if self._chunk is None:
                wish = self.control.wish(now)
                if wish is None:
                    return False
                direction = self._ask() if wish.direction is None else wish.direction
                if direction is None:
                    return False  # the pilot is still thinking; whoever drives is heard meanwhile
                self._chunk = self._decide(wish, direction)
                if wish.kind == "pilot" and self._reasoner is not None:
                    return False  # that may have taken long: first hear whether it is still wanted
            self._execute(self._chunk)
        except WorkerError as error:
            self._fail(error)
        except CounterflowError as error:  # of a policy or a reasoner: the episode can be gone on with
            self._chunk = None
            self.note(str(error), "error")
            self.pause(str(error))
        return True

    def _ask(self) -> Direction | None:
        """Return what the pilot says, or None while one that looks at pictures, and may take seconds, is thinking."""
        reasoner = self._reasoner
        if reasoner is None:
            return Direction(defer=True)
        if not getattr(reasoner, "looks", False):
            return reasoner.decide(seen_by(reasoner, self._require_env(), self._batch, 0))
        if self._question is not None and self._question[0].done():
            (answer, step), self._question = self._question, None
            if step == self._episode.steps:
                return answer.result()
            answer.exception()  # the robot has moved since it was asked: whatever it was, it is nobody's
        if self._question is None:
            self._abandoned = [one for one in self._abandoned if not one.done()]
            if len(self._abandoned) >= MOST_ABANDONED:
                return None  # an endpoint that hangs is not asked ever more often
            view = seen_by(reasoner, self._require_env(), self._batch, 0)
            self._question = (self._questions.submit(reasoner.decide, view), self._episode.steps)
            if self._question[0].done():
                return self._ask()
        return None

    def _decide(self, wish: Wish, direction: Direction) -> _Chunk:
        before, spec = self._batch.observation, self.target.action_spec
        speaks = not direction.defer
        intervened = self.method == "dsbc" and speaks
        method = self._helping if intervened else self.method
        reference = to_reference([direction], spec, self.convention) if speaks else None
        decided = self._act(method, before, reference, self._noise)
        plan = decided.plan
        base = self._uncorrected(before) if intervened else plan
        self._sequence = wish.sequence
        self._drawn = self._draw_plan(plan)
        return _Chunk(
            wish,
            direction,
            plan,
            method,
            decided.reusable,
            intervened,
            before[0],
            plan.actions[0, : spec.executed].float().cpu().numpy(),
            base,
        )

    def _uncorrected(self, observation: npt.NDArray[np.float32]) -> Plan:
        """Return what the noise policy would have done here by itself: what a correction corrects."""
        rng = RowGenerators([child_seed(self._episode.seed, "uncorrected", self._episode.steps)])
        return self._act("dsbc", observation, None, rng).plan

    @property
    def _helping(self) -> str:
        return next(name for name in HELPING if not self.target.lacks(name))

    def _act(
        self, method: str, observation: npt.NDArray[np.float32], reference: Reference | None, rng: RowGenerators
    ) -> Decided:
        steering, learned = self.steering, self.learned.get(self.noise_policy or "") if method == "dsbc" else None
        if method == "frs" and self.method == "dsbc" and self.target.binding is not None:
            # Somebody helps: with the recorded K, so that the noise is what the noise policy should have said.
            steering = replace(steering, reversal_steps=self.target.binding.steps)
        return self.target.act(method, steering, learned, observation, reference, rng)

    def _execute(self, chunk: _Chunk) -> None:
        env = self._require_env()
        index = len(chunk.rewards)
        chunk.seen.append(self._batch.observation[0])
        self._batch = env.execute(chunk.actions[None, index : index + 1], rows=[0], record=[0])
        chunk.rewards.append(float(self._batch.rewards[0, 0]))
        self._episode.steps += 1
        self._episode.success = self._episode.success or bool(self._batch.success[0])
        self._show(self._batch.frames[0][-1], chunk)
        if index == 0:  # after the first action has gone, so that the key was answered by then
            self._draw_fan(chunk.observation)
        over = bool(self._batch.done[0])
        if over or index + 1 == len(chunk.actions):
            self._end_chunk()
        if over:
            self._finish()

    def _end_chunk(self) -> None:
        """Note the decision as far as it was executed."""
        chunk, self._chunk = self._chunk, None
        if chunk is None or not chunk.rewards:
            return
        plan, count = chunk.plan, len(chunk.rewards)
        whole = plan.chunk[0]
        reference, active, steered = torch.zeros_like(whole), False, torch.zeros_like(whole, dtype=torch.bool)
        if plan.reference is not None and bool(plan.reference.active[0]):
            reference, active, steered = plan.reference.chunk[0], True, plan.reference.steered[0]
        self._episode.decisions.append(
            Decision(
                observation=chunk.observation,
                features=None if plan.features is None else plan.features[0].float().cpu().numpy(),
                reference=reference.float().cpu().numpy(),
                active=active,
                steered=steered.cpu().numpy(),
                noise=plan.noise[0].float().cpu().numpy(),
                start_time=float(plan.start_time[0]),
                chunk=whole.float().cpu().numpy(),
                intervened=chunk.intervened,
                step_observations=np.stack(chunk.seen),
                step_actions=chunk.actions[:count],
                rewards=np.asarray(chunk.rewards, np.float32),
                base_noise=chunk.base.noise[0].float().cpu().numpy(),
                base_chunk=chunk.base.base_chunk[0].float().cpu().numpy(),
            )
        )
        self._episode.methods.append("dsbc" if chunk.intervened else chunk.method)
        self._episode.reusable.append(chunk.reusable)

    def _finish(self) -> None:
        self.state = "finished"
        self.reason = "success" if self._episode.success else "out of time"
        self.control.let_go()
        self._count_outcome(success=self._episode.success)

    def _fail(self, error: CounterflowError) -> None:
        self.state, self.reason = "failed", str(error)
        self._chunk = None
        self.note(str(error), "error")

    def _close_episode(self) -> None:
        """Leave an episode behind: kept if it is over, a failure if it was given up, nothing if it was never driven."""
        episode: _Episode | None = getattr(self, "_episode", None)
        if episode is None or episode.closed:
            return
        if self.state == "finished":
            self._keep_undecided()
        else:
            self._end_chunk()
            if episode.decisions:
                self._count_outcome(success=False)
        episode.closed = True

    def _keep_undecided(self) -> None:
        if self.target.binding is not None:
            self.keep()

    def _count_outcome(self, *, success: bool) -> None:
        one = self._episode
        try:
            self.tallies.add(Outcome(one.env, one.seed, one.index, one.method, success, one.steps, len(one.decisions)))
        except CounterflowError as error:
            self.note(str(error), "error")

    # Keeping, training, filming: in the background

    def _keep(self, episode: _Episode) -> str:
        try:
            return self._write_episode(episode)
        except BaseException:
            episode.kept = ""  # a full disk, or a folder that somebody else writes to: it can be tried again
            raise

    def _write_episode(self, episode: _Episode) -> str:
        """Put an episode into the dataset as `counterflow record` does; return what to say."""
        helped = "dsbc" in episode.methods
        arrays = arrays_of(episode.decisions, bases=helped)
        binding = self.target.binding
        assert binding is not None
        self.target.complete(arrays, np.array(episode.reusable), steps=episode.success or helped)
        if "step_noise" in arrays:
            arrays["step_intervened"] = np.repeat(arrays["intervened"], arrays["executed"])
        arrays["method"] = np.array([METHODS.index(method) for method in episode.methods], np.int64)
        place = self.settings.out / (CORRECTIONS if helped else RECORDINGS)
        provenance = {
            "recording": "cockpit",
            "env": episode.env,
            "methods": list(METHODS),
            "every_step": "regularised",
            "seed": self.settings.seed,
            "policy": binding.policy,
        }
        with self._writing, SteeringDataset.create_or_open(place, binding) as dataset:
            source = dataset.add_source(provenance)
            dataset.append(SteeringEpisode(episode.env, episode.seed, episode.index, episode.success, source, arrays))
        self._count_recordings()
        return f"episode {episode.index} is kept ({'success' if episode.success else 'failure'})"

    def _train(self, training: Training, env: str, initial: ChunkRegressor | None) -> str:
        made = train(
            self.settings.out,
            env,
            training,
            config=self._distillation(),
            initial=initial,
            seed=self.settings.seed,
        )
        if made is None:
            raise InvalidInputError(training.message)
        self.learned = self.learned | {training.name: made}
        return f"{training.name} is trained"

    def _distillation(self) -> DSBCConfig:
        """Return how to train: on observations where the policy offers no features."""
        config = self.settings.distillation
        if self.target.inputs == "features" or config.regressor.inputs == "observation":
            return config
        return replace(config, regressor=replace(config.regressor, inputs="observation"))

    def _write_film(self, episode: _Episode, camera: CameraView, spec: EnvSpec) -> str:
        from counterflow.cockpit.filming import write_film

        path = self.settings.out / "videos" / f"episode-{episode.index}.mp4"
        shots = [(one.jpeg, one.method, one.direction, one.effector) for one in episode.shots]
        write_film(path, shots, camera, spec.max_episode_steps, episode.success, spec.task)
        return f"{path.name} is written"

    def _later(self, what: str, function: Callable[..., Any], *arguments: Any) -> None:
        self._pending.append((what, self._background.submit(function, *arguments)))

    def _take_in(self) -> None:
        """Say what became of what was done in the background."""
        for entry in [entry for entry in self._pending if entry[1].done()]:
            self._pending.remove(entry)
            what, future = entry
            error = future.exception()
            if error is None:
                self.note(str(future.result()), "done")
            else:
                self.note(f"{what}: {error}", "error")

    # What is shown

    def note(self, text: str, kind: str = "info") -> None:
        """Say something to everybody who watches."""
        self._noted += 1
        self.notes.append({"number": self._noted, "kind": kind, "text": text[:600]})

    def describe(self) -> dict[str, Any]:
        """Return everything but the picture, as plain values."""
        episode = self._episode
        binding = self.target.binding
        recorded = self.steering.reversal_steps if binding is None else binding.steps
        return {
            "env": self.env_name,
            "task": self.spec.task,
            "tasks": self.tasks,
            "state": self.state,
            "moving": self.is_moving,
            "reason": self.reason,
            "episode": {
                "index": episode.index,
                "step": episode.steps,
                "max_steps": self.spec.max_episode_steps,
                "decisions": len(episode.decisions),
                "success": episode.success,
                "kept": episode.kept,
                "method": episode.method if episode.methods else "",
            },
            "rate": self.settings.rate,
            "method": self.method,
            "methods": [{"name": name, "lacks": self._lacks(name)} for name in METHODS],
            "target": self.target.about,
            "keeps": self.target.binding is not None,
            "adjustable": sorted(self.target.settings),
            "settings": {
                "reversal_steps": self.steering.reversal_steps
                if "reversal_steps" in self.target.settings
                else recorded,
                "steps": self.steering.steps,
                "tau": self.steering.tau,
                "candidates": self.steering.candidates,
                "magnitude": self.convention.magnitude,
                "recorded_steps": recorded,
            },
            "gripper": self.control.gripper,
            "pilot": self.pilot or "",
            "pilots": ["policy", *self._reasoners],
            "thinking": self._question is not None,
            "noise_policy": self.noise_policy,
            "noise_policies": list(self.learned),
            "tallies": self.tallies.of(self.env_name),
            "dataset": self._counts,
            "training": None if self.training is None else self.training.to_json(),
            "busy": [what for what, _ in self._pending],
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
        self.target.close()
        if self._env is not None:
            self._env.close()
            self._env = None

    @property
    def is_moving(self) -> bool:
        """Whether a chunk is being executed."""
        return self._chunk is not None

    @property
    def tasks(self) -> list[str]:
        """The tasks of this family."""
        return [name for name in env_names() if family_of(name) == family_of(self.settings.env)]

    @property
    def convention(self) -> Convention:
        """How directions are written into chunks now."""
        return ReasonerSettings(convention=self.settings.convention, magnitude=self.magnitude).writing()

    def _lacks(self, method: str) -> str:
        """Return why a method can't be driven with; "" where it can."""
        lacking = self.target.lacks(method)
        if not lacking and method == "dsbc" and not self.learned:
            return "there is no noise policy yet: keep successes and press 'train', or start with --noise-policy"
        return lacking

    def _draw_fan(self, observation: npt.NDArray[np.float32]) -> None:
        """Draw what the policy might do by itself: now, or, where a server is asked, as soon as it has answered."""
        asked = (observation, self.steering, self._episode.steps)
        if not self.target.slow:
            self._drawn["fan"] = self._paths(self.target.fan(*asked), self._at)
        elif self._sampling is None:
            self._sampling = self._questions.submit(self.target.fan, *asked), self._at, self._drawn

    def _take_samples(self) -> None:
        if self._sampling is not None and self._sampling[0].done():
            (future, start, drawn), self._sampling = self._sampling, None
            if future.exception() is None:  # where it fails, whoever drives hears of it by the next chunk
                drawn["fan"] = self._paths(future.result(), start)

    def _paths(self, actions: npt.NDArray[np.float32], start: npt.NDArray[np.float64]) -> list[Any]:
        return paths_of(actions, self.target.action_spec, self.camera, start)

    def _draw_plan(self, plan: Plan) -> dict[str, Any]:
        self._at = self.effector
        drawn: dict[str, Any] = {"chunk": self._paths(plan.actions.float().cpu().numpy(), self._at)}
        if plan.reference is not None:
            reference = executable(plan.reference.chunk.cpu(), self.target.action_spec)
            drawn["reference"] = self._paths(reference, self._at)
        drawn["agreement"] = _number(plan.agreement[0])
        drawn["noise_percentile"] = _number(plan.noise_percentile[0])
        return drawn

    def _show(self, image: npt.NDArray[np.uint8], chunk: _Chunk | None) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=QUALITY)
        jpeg = buffer.getvalue()
        effector = self.effector
        gripper = self.camera.project(effector[None])[0] / (self.camera.width, self.camera.height)
        overlay = {**self._drawn, "gripper": [_number(value) for value in gripper]}
        number = 1 if self.frame is None else self.frame.number + 1
        self.frame = Frame(number, jpeg, overlay, self._episode.steps, self._sequence)
        if len(self._episode.shots) < MOST_FRAMES:
            method = "" if chunk is None else chunk.method
            self._episode.shots.append(_Shot(jpeg, method, None if chunk is None else chunk.direction, effector))

    @property
    def effector(self) -> npt.NDArray[np.float64]:
        """Where the gripper is, (3,) metres."""
        return self._batch.view(0)["proprio/effector_pos"]

    # The simulator

    def _open(self) -> None:
        self._env = self._make(replace(self.settings, env=self.env_name))
        self.spec = self._env.spec
        for what, future in self._pending:
            if what == "keep":
                future.exception()  # noises are found with the policy as it was told of that episode's task
        self.target.fit(self.spec)
        check_fit(self.target, self.spec)
        self._next_index = max(self.tallies.next_index, getattr(self, "_next_index", 0))
        layout = self.target.action_spec.layout
        gripper: Any = "open" if layout is not None and layout.gripper is not None else "policy"
        first: Batch = self._env.reset([0])  # cameras stand where they stand only after a reset
        self._batch = first
        self.camera = self._env.camera()
        self.control = Control(ways_of(self.camera.rotation), self.settings.stale_after, gripper)
        self.control.pilot = self.pilot is not None

    def _reopen(self) -> None:
        if self._env is not None:
            self._env.close()
            self._env = None
        try:
            self._open()
        except CounterflowError as error:
            self._fail(error)
            return
        if self.pilot is not None:
            self.hand_over(self.pilot)
        self.state = "paused"
        self._count_recordings()
        self.begin()

    def _require_env(self) -> VectorEnv:
        if self._env is None:
            raise WorkerError("there is no simulator. Press 'restart the simulator'.")
        return self._env

    def _reset_reasoner(self) -> None:
        if self._question is not None:
            self._abandon_question()
            if self.pilot in self._reasoners:  # the one that is thinking goes on doing so, and nobody listens
                self._reasoner = self._reasoners[self.pilot](self.env_name)
        if self._reasoner is not None and hasattr(self, "_episode"):
            self._reasoner.reset(child_seed(self._episode.seed, "reasoner"))

    def _abandon_question(self) -> None:
        """Wait no longer for the pilot's answer. What it was asked goes on until it times out, in its own thread."""
        if self._question is not None and not self._question[0].cancel():
            self._abandoned.append(self._question[0])
        self._question = None

    def _load_learned(self) -> None:
        """Load what was learned in this folder before, and what was given."""
        settings = self.settings
        for path in sorted(
            (settings.out / POLICIES).glob("*.safetensors"), key=lambda path: (len(path.name), path.name)
        ):
            try:
                learned = ChunkRegressor.load(path, settings.device)
                self.target.check_learned(learned)
            except CounterflowError:
                continue  # of another policy, or damaged: it can't drive
            self.learned[path.stem] = learned
        if settings.noise_policy is not None:
            given = ChunkRegressor.load(settings.noise_policy, settings.device)
            self.target.check_learned(given)
            self.learned[settings.noise_policy.stem] = given
        self.noise_policy = next(reversed(self.learned), None)
        if lacking := self._lacks(self.method):
            raise InvalidInputError(f"{self.method!r} can't be chosen: {lacking}.")

    def _count_recordings(self) -> None:
        counts: dict[str, Any] = {}
        for name in (RECORDINGS, CORRECTIONS):
            try:
                dataset = SteeringDataset.load(self.settings.out / name)
            except CounterflowError:
                counts[name] = {"episodes": 0, "successes": 0, "decisions": 0}
                continue
            own = [episode for episode in dataset if episode.env == self.env_name]
            counts[name] = {
                "episodes": len(own),
                "successes": sum(episode.success for episode in own),
                "decisions": sum(episode.decisions for episode in own),
            }
        self._counts = counts


def _make_env(settings: SessionSettings) -> VectorEnv:
    render = RenderSettings(settings.size, settings.size)
    return make_env(settings.env, 1, workers=settings.workers, render=render)


def _number(value: Any) -> float | None:
    """Return a number that json knows."""
    number = float(value)
    return round(number, 4) if np.isfinite(number) else None
