"""Policies that look: they are shown what they ask for, where and when they decide, and what can't be shown is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import counterflow.experiments.record as recording
from counterflow.envs import VectorEnv
from counterflow.envs.types import EnvSpec, Sights
from counterflow.errors import MismatchError, UnknownNameError
from counterflow.experiments.distill import distill
from counterflow.experiments.evaluate import evaluate
from counterflow.experiments.online_data import prefill
from counterflow.experiments.probe import probe
from counterflow.experiments.record import Recorded, record
from counterflow.experiments.rollout import run_episodes
from counterflow.experiments.sight import Eyes, check_fit
from counterflow.experiments.steering_env import SteeredRows
from counterflow.experiments.weight import weigh
from counterflow.layout import ActionLayout
from counterflow.learning.dsbc import DSBCConfig
from counterflow.policies import ActionSpec, FlowPolicy
from counterflow.policies.observation import ObservationEntry
from counterflow.steering import GuidanceSettings, MethodSettings, SteeringSpace, steer

from .conftest import Plane

FRONT, WRIST, STATE = "observation.images.front", "observation.images.wrist", "observation.state"
SIZE, REACH = 48, 4.0


class Painted(Plane):
    """The plane, and two pictures of it: the point red and the corner green from above; and the point's own neighbourhood."""

    spec = EnvSpec(
        "painted", "painted", "go there", 4, 2, (-1.0,) * 2, (1.0,) * 2, ActionLayout((0, 1)), 12,
        sights={FRONT: (SIZE, SIZE + 8, 3), WRIST: (SIZE, SIZE, 3), STATE: (2,)},
    )  # fmt: skip
    drawn: list[tuple[int, str]]  # by whom, what; shared by all rows

    def look(self, names: Sequence[str]) -> Sights:
        grid = np.linspace(-REACH, REACH, SIZE)
        told: Sights = {}
        for name in names:
            self.drawn.append((id(self), name))
            if name == STATE:
                told[name] = self.at.astype(np.float32)
                continue
            centre = np.zeros(2) if name == FRONT else self.at
            picture = np.zeros((SIZE, SIZE + 8 if name == FRONT else SIZE, 3), np.uint8)
            for channel, point in enumerate((self.at, self.goal)):
                near = [np.exp(-5 * (grid + middle - at) ** 2) for middle, at in zip(centre, point, strict=True)]
                picture[:, :SIZE, channel] = np.round(255 * np.outer(*near))
            told[name] = picture
        return told


class Looking:
    """A flow that has to find the point in the pictures before it can move it; frozen, never trained."""

    observation_entries = {  # noqa: RUF012
        FRONT: ObservationEntry("image", (3, None, None)),
        STATE: ObservationEntry("float32", (2,)),
        "task": ObservationEntry("text"),
        "observation.images.empty_camera_0": ObservationEntry("image", (3, None, None), optional=True),
    }

    def __init__(self, inner: FlowPolicy) -> None:
        self.inner, self.action_spec, self.fingerprint = inner, inner.action_spec, "looking"
        self.seen: list[dict[str, Any]] = []

    def encode(self, observation: dict[str, Any]) -> Tensor:
        self.seen.append(observation)
        picture = observation[FRONT]
        found = []
        for channel in (0, 1):
            weight = picture[:, channel, :, :SIZE].double()
            grid = torch.linspace(-REACH, REACH, SIZE, dtype=torch.float64)
            total = weight.sum((1, 2)).clamp_min(1e-9)
            found += [(weight.sum(2) @ grid) / total, (weight.sum(1) @ grid) / total]
        return self.inner.encode(torch.stack(found, 1).float())

    def velocity(self, context: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return self.inner.velocity(context, x, t)

    def features(self, context: Tensor) -> Tensor:
        return self.inner.features(context)


@pytest.fixture
def painted() -> Any:
    """Make painted planes of so many rows; `drawn` of the result says what was drawn."""

    def make(rows: int = 1) -> Any:
        drawn: list[tuple[int, str]] = []
        kind = type("Watched", (Painted,), {"drawn": drawn})
        env = VectorEnv([kind] * rows, 0, workers=0)
        env.drawn = drawn  # type: ignore[attr-defined]
        return env

    return make


@pytest.fixture
def policy(prior: FlowPolicy) -> Looking:
    return Looking(prior)


class TestEyes:
    def test_what_is_asked_for_comes_as_a_policy_takes_it(self, painted: Any, policy: Looking) -> None:
        env = painted(2)
        batch = env.reset([1, 2])
        seen = Eyes(policy, env).see(batch.observation, [0, 1])
        assert isinstance(seen, dict)
        assert {*seen} == {FRONT, STATE, "task"}
        assert seen["task"] == "go there"
        assert seen[FRONT].shape == (2, 3, SIZE, SIZE + 8)
        assert seen[FRONT].dtype == seen[STATE].dtype == torch.float32
        for row in (0, 1):
            picture = env._host._envs[row].look([FRONT])[FRONT]
            torch.testing.assert_close(
                seen[FRONT][row], torch.from_numpy(picture).permute(2, 0, 1) / 255, rtol=0, atol=0
            )
        np.testing.assert_array_equal(seen[STATE], batch.observation[:, :2])
        assert float(seen[FRONT].max()) == pytest.approx(1.0, abs=0.05)
        assert not torch.equal(seen[FRONT][0], seen[FRONT][1])

    def test_only_rows_that_decide_are_looked_at_and_others_keep_what_they_saw(
        self, painted: Any, policy: Looking
    ) -> None:
        env = painted(3)
        batch = env.reset([1, 2, 3])
        eyes = Eyes(policy, env)
        first = eyes.see(batch.observation, [0, 1])
        assert isinstance(first, dict)
        assert [name for _, name in env.drawn] == [FRONT, STATE] * 2
        assert not first[FRONT][2].any()
        env.drawn.clear()
        batch = env.execute(np.ones((3, 1, 2)))
        second = eyes.see(batch.observation, [1])
        assert isinstance(second, dict)
        assert {who for who, _ in env.drawn} == {id(env._host._envs[1])}
        assert torch.equal(second[FRONT][0], first[FRONT][0])
        assert not torch.equal(second[FRONT][1], first[FRONT][1])

    def test_policies_on_states_see_them_as_they_are_and_nothing_is_drawn(
        self, painted: Any, prior: FlowPolicy
    ) -> None:
        env = painted(2)
        batch = env.reset([1, 2])
        seen = Eyes(steer(prior, "frs"), env).see(batch.observation, [0])
        assert isinstance(seen, Tensor)
        np.testing.assert_array_equal(seen, batch.observation)
        run_episodes(steer(prior, "base"), env, [1, 2], film=False)
        assert not env.drawn

    def test_cameras_alone_are_enough(self, painted: Any, prior: FlowPolicy) -> None:
        class Cameras:
            cameras, action_spec = (WRIST,), prior.action_spec

        env = painted()
        seen = Eyes(Cameras(), env).see(env.reset([1]).observation, [0])  # type: ignore[arg-type]
        assert isinstance(seen, dict)
        assert {name: tuple(one.shape) for name, one in seen.items()} == {WRIST: (1, 3, SIZE, SIZE)}

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            (
                {"observation.images.base_0_rgb": ObservationEntry("image", (3, None, None))},
                r"wants to see observation\.images\.base_0_rgb \(image \(3, any, any\)\); painted shows "
                r"observation\.images\.front \(48, 56, 3\), .*rename_map",
            ),
            (
                {STATE: ObservationEntry("float32", (8,))},
                r"observation\.state \(float32 \(8\)\).*observation\.state \(2,\)",
            ),
            ({FRONT: ObservationEntry("image", (3, 224, 224))}, r"front \(image \(3, 224, 224\)\)"),
            ({"prompt": ObservationEntry("text")}, r"prompt \(text\)"),
        ],
    )
    def test_what_is_not_shown_is_refused(
        self, painted: Any, policy: Looking, entries: dict[str, ObservationEntry], message: str
    ) -> None:
        policy.observation_entries = {**policy.observation_entries, **entries}
        with pytest.raises(MismatchError, match=message):
            run_episodes(steer(policy, "base"), painted(), [1])

    def test_an_environment_without_pictures_says_so(self, plane: Any, policy: Looking) -> None:
        with pytest.raises(MismatchError, match=r"front \(image .*plane shows no images, and a state of 4 numbers"):
            Eyes(policy, plane())
        with pytest.raises(
            MismatchError, match=r"1 cameras \(observation\.images\.front\).*'eval', 'compare', 'record'"
        ):
            check_fit(policy, Plane.spec)

    def test_actions_must_fit_too(self, painted: Any, policy: Looking) -> None:
        policy.action_spec = ActionSpec(2, 3)
        with pytest.raises(MismatchError, match="acts in 3 dimensions and painted expects 2"):
            Eyes(policy, painted())


def test_a_vector_environment_shows_what_is_named_and_no_more(painted: Any) -> None:
    env = painted(3)
    env.reset([1, 2, 3])
    shown = env.look([STATE, WRIST], [2, 0])
    assert [*shown] == [STATE, WRIST]
    for position, row in enumerate([2, 0]):
        for name, one in env._host._envs[row].look([STATE, WRIST]).items():
            np.testing.assert_array_equal(shown[name][position], one)
    with pytest.raises(UnknownNameError, match=r"observation\.images\.front"):
        env.look(["observation.images.frnt"])


class TestRollouts:
    def test_pictures_are_drawn_at_decisions_and_decide(self, painted: Any, policy: Looking) -> None:
        env = painted(2)
        episodes = run_episodes(steer(policy, "base"), env, [1, 2, 3], record=True)
        decisions = sum(one.chunks for one in episodes)
        assert sum(one.steps for one in episodes) > decisions
        assert [name for _, name in env.drawn] == [FRONT, STATE] * decisions
        for seen in list(policy.seen):  # what is in the picture is where the point is
            found = policy.inner.observation_normaliser.denormalise(policy.encode(seen))[:, :2]
            torch.testing.assert_close(found, seen[STATE], rtol=0, atol=0.03)
        for episode in episodes:
            for one in episode.decisions:
                assert one.observation.shape == (4,)
                assert one.features is not None
                np.testing.assert_allclose(one.features[:4], one.observation, atol=0.03)

    def test_an_episode_does_not_depend_on_its_neighbours(self, painted: Any, policy: Looking) -> None:
        expected = run_episodes(steer(policy, "frs"), painted(), [5])[0]
        for seeds in ([5, 1, 2], [3, 1, 2, 4, 5]):
            found = run_episodes(steer(policy, "frs"), painted(3), seeds)[seeds.index(5)]
            assert (found.success, found.steps) == (expected.success, expected.steps)
            assert found.noise_percentile == pytest.approx(expected.noise_percentile, rel=1e-4)

    def test_candidates_are_drawn_of_a_single_look(self, painted: Any, policy: Looking) -> None:
        env = painted()
        found = run_episodes(steer(policy, "rank", MethodSettings(candidates=4)), env, [1], max_chunks=2)
        assert len(env.drawn) == 2 * found[0].chunks


@pytest.fixture
def recorded(painted: Any, policy: Looking, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Record with the looking policy."""
    monkeypatch.setattr(recording, "load_prior", lambda *_: policy)
    monkeypatch.setattr(recording, "open_env", lambda *_, **__: painted(4))

    def make(method: str = "base") -> Recorded:
        return record("painted", method, tmp_path / method, episodes=40, settings=MethodSettings(steps=5))

    return make


class TestLearning:
    def test_recorded_features_are_distilled_and_act(self, recorded: Any, painted: Any, policy: Looking) -> None:
        made = recorded()
        assert made.successes >= 2
        kept = recording.SteeringDataset.load(made.path).episodes[0].arrays
        assert kept["observations"].shape[1:] == (4,)
        np.testing.assert_allclose(kept["features"][:, :4], kept["observations"], atol=0.03)
        assert "step_noise" not in kept
        out = made.path.parent / "noise-policy.safetensors"
        config = DSBCConfig(steps=20)
        learned = distill([made.path], out, config)
        found = evaluate(painted(2), policy, "dsbc", 3, 0, learned=learned)
        assert found.rate.episodes == 3
        assert found.settings["learned"] == learned.fingerprint

    def test_reinforcement_learning_sees_the_features(self, recorded: Any, painted: Any, policy: Looking) -> None:
        env, space = painted(2), SteeringSpace(policy, steps=5)
        rows = SteeredRows(env, space, [1, 2], recording=True)
        shown = rows.begin()
        torch.testing.assert_close(shown[:, :4], torch.from_numpy(rows.observation), rtol=0, atol=0.03)
        for _ in range(3):
            before, shown = shown, rows.step(torch.zeros(2, space.size)).shown
            torch.testing.assert_close(shown[:, :4], torch.from_numpy(rows.observation), rtol=0, atol=0.03)
            features = np.stack([one[-1].features for one in rows.decisions])  # type: ignore[arg-type]
            np.testing.assert_array_equal(features, before)
        kept = [[one.features for one in several] for several in rows.decisions]
        again = SteeredRows(painted(2), space, [1, 2], recording=True)
        torch.testing.assert_close(again.resume(rows.episodes, rows.history), shown)
        np.testing.assert_allclose([[one.features for one in several] for several in again.decisions], kept)

        begun = prefill(recorded().path, space, "painted")
        assert begun.recorded.observations.shape[1] == shown.shape[1]

    @pytest.mark.parametrize("method", ["direct", "partial"])
    def test_noises_are_not_looked_for_where_pictures_are_gone(self, recorded: Any, method: str) -> None:
        with pytest.raises(MismatchError, match=rf"{method}.* found by inversion .*keep no pictures.*'frs'"):
            recorded(method)

    def test_what_computes_on_recorded_states_refuses_before_it_begins(self, painted: Any, policy: Looking) -> None:
        env = painted()
        with pytest.raises(MismatchError, match="a weight is found at recorded observations.*Give it as a number"):
            weigh(env, steer(policy, "base"), None, GuidanceSettings(weight="auto"), 0)  # type: ignore[arg-type]
        with pytest.raises(MismatchError, match="keep no pictures"):
            probe(env, policy, 2)
        assert not env.drawn

    def test_without_features_a_learner_beside_it_would_see_nothing(
        self, painted: Any, policy: Looking, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delattr(Looking, "features")
        with pytest.raises(MismatchError, match=r"Looking looks at .*front.*and offers no features"):
            SteeredRows(painted(), SteeringSpace(policy), [1]).begin()
