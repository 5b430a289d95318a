"""A policy as clients meet it: what is read, what is refused, and that neighbours in a batch don't matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.envs import make_env
from counterflow.errors import CounterflowError, InvalidInputError, MismatchError, ServingError, UnknownNameError
from counterflow.policies import ActionSpec, FieldPolicy, FlowPolicy, Normaliser
from counterflow.policies.observation import ObservationEntry
from counterflow.random import generator
from counterflow.reasoners import Direction, scripted_reasoner, to_reference
from counterflow.serving import ServedPolicy
from counterflow.serving.requests import Request
from counterflow.serving.served import Answer, Session
from counterflow.steering import (
    ChunkRegressor,
    FlowReversal,
    Gaussian,
    Limits,
    RegressorConfig,
    SteeredPolicy,
    binding_of,
    steer,
    steer_learned,
)

MakeServed = Callable[..., ServedPolicy]
HORIZON, DIM, SEEN = 3, 4, 6


def state(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(SEEN).astype(np.float32)


def chunk(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((HORIZON, DIM)).astype(np.float32)


def request(served: ServedPolicy, session: Session | None = None, **message: Any) -> Request:
    message = {"observation": state(), **message}
    return served.complete(served.read(message), served.session() if session is None else session)


def decide(served: ServedPolicy, *requests: Request) -> list[Answer]:
    answers = served.act(requests)
    for answer in answers:
        if isinstance(answer, Exception):
            raise answer
    return [answer for answer in answers if isinstance(answer, Answer)]


def regressor(prior: FlowPolicy, target: str) -> ChunkRegressor:
    torch.manual_seed(1)
    config = RegressorConfig(target=target, members=2, width=8, depth=1)  # type: ignore[arg-type]
    size = HORIZON * DIM
    return ChunkRegressor(
        config,
        Normaliser(torch.zeros(SEEN), torch.ones(SEEN)),
        Normaliser(torch.zeros(size), torch.ones(size)),
        binding_of(prior, 4),
    )


class TestBatches:
    @pytest.mark.parametrize("method", ["base", "frs", "partial", "rank", "direct"])
    def test_neighbours_do_not_matter(self, make_served: MakeServed, method: str) -> None:
        """The same requests, together and one by one: with a noise, a direction, a chunk, both, and nothing."""
        served = make_served(method=method)
        steers: list[Any] = [None] * 6
        if method != "base":
            steers = [
                None,
                {"axes": [0, 1, 0]},
                chunk(1),
                {"defer": True},
                {"axes": [1, 0, -1], "gripper": "open"},
                None,
            ]
        noises = [chunk(10), chunk(11), None, chunk(12), None, None]
        requests = [
            request(served, observation=state(index), steer=one, noise=noise)
            for index, (one, noise) in enumerate(zip(steers, noises, strict=True))
        ]
        together = decide(served, *requests)
        alone = [decide(served, one)[0] for one in requests]
        reverse = decide(served, *requests[::-1])[::-1]
        for ours, theirs, others in zip(together, alone, reverse, strict=True):
            np.testing.assert_allclose(ours.actions, theirs.actions, atol=1e-5)
            np.testing.assert_allclose(ours.actions, others.actions, atol=1e-5)
            np.testing.assert_allclose(ours.noise, theirs.noise, atol=1e-5)
        assert {answer.batch_size for answer in together} == {6}
        assert len({answer.actions.tobytes() for answer in together}) == 6

    def test_one_that_fails_does_not_fail_the_others(self, make_served: MakeServed, prior: FlowPolicy) -> None:
        served = make_served()
        good = request(served)
        bad = Request({"observation": np.full(SEEN, np.nan, np.float32)}, None, None, 0)  # as if it hadn't been checked
        first, failed, last = served.act([good, bad, good])
        assert isinstance(failed, InvalidInputError)
        assert isinstance(first, Answer)
        assert isinstance(last, Answer)
        np.testing.assert_array_equal(first.actions, last.actions)

    def test_actions_that_are_not_numbers_are_kept_back(self) -> None:
        def field(x: torch.Tensor, t: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
            return mean[:, :1, None] / (mean[:, :1, None] - 1) - x

        served = ServedPolicy(FieldPolicy(field, ActionSpec(HORIZON, DIM)))
        good, bad = np.zeros(1, np.float32), np.ones(1, np.float32)
        answers = served.act([request(served, observation=one) for one in (good, bad, good)])
        assert isinstance(answers[1], ServingError)
        assert "NaN or infinite; none are sent" in str(answers[1])
        assert isinstance(answers[0], Answer)
        assert isinstance(answers[2], Answer)


class TestDraws:
    def test_a_noise_is_honoured(self, make_served: MakeServed, prior: FlowPolicy) -> None:
        served, noise = make_served(method="base"), chunk(7)
        (answer,) = decide(served, request(served, noise=noise))
        np.testing.assert_array_equal(answer.noise, noise)

        def given(policy: Any, context: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.from_numpy(noise)[None], torch.zeros(1)

        expected = SteeredPolicy(prior, start=given, steps=4).act(torch.from_numpy(state())[None])
        np.testing.assert_allclose(answer.actions, expected.actions[0].numpy(), atol=1e-6)
        other = decide(served, request(served, noise=chunk(8)))[0]
        assert not np.allclose(answer.actions, other.actions)

    def test_where_the_reference_is_silent_the_noise_is_used(self, make_served: MakeServed) -> None:
        """The gripper is the policy's: its noise is the request's, all else is reversed."""
        served, noise = make_served(), chunk(7)
        (answer,) = decide(served, request(served, noise=noise, steer={"axes": [0, 0, 1]}))
        np.testing.assert_array_equal(answer.noise[:, 3], noise[:, 3])
        assert not np.isclose(answer.noise[:, :3], noise[:, :3]).any()

    def test_every_candidate_may_have_its_own(self, make_served: MakeServed) -> None:
        served = make_served(method="rank")
        noises = np.stack([chunk(seed) for seed in range(8)])
        (answer,) = decide(served, request(served, noise=noises, steer={"axes": [0, 0, 1]}))
        assert any(np.array_equal(answer.noise, noise) for noise in noises)
        (same,) = decide(served, request(served, noise=noises[3], steer={"axes": [0, 0, 1]}))
        np.testing.assert_array_equal(same.noise, noises[3])

    def test_every_client_and_every_request_draws_its_own_and_a_seed_repeats_it(self, make_served: MakeServed) -> None:
        def noises(seed: int) -> list[bytes]:
            served = make_served(method="base", seed=seed)
            sessions = [served.session(), served.session()]
            return [
                decide(served, request(served, session))[0].noise.tobytes() for session in sessions for _ in range(2)
            ]

        assert len(set(noises(0))) == 4
        assert noises(0) == noises(0)
        assert not set(noises(0)) & set(noises(1))

    def test_another_client_does_not_shift_the_draws(self, make_served: MakeServed) -> None:
        def last(requests_of_another: int) -> np.ndarray:
            served = make_served(method="base")
            mine, other = served.session(), served.session()
            for _ in range(requests_of_another):
                request(served, other)
            return decide(served, request(served, mine))[0].noise

        np.testing.assert_array_equal(last(0), last(3))

    def test_a_policy_that_draws_nothing_refuses_a_noise(self, prior: FlowPolicy) -> None:
        for target in ("noise", "action"):
            served = ServedPolicy(steer_learned(prior, regressor(prior, target)))
            decide(served, request(served))
            with pytest.raises(MismatchError, match="does not start at a fresh draw"):
                request(served, noise=chunk())

        def own(policy: Any, context: Any, rng: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(context.batch_size, HORIZON, DIM), torch.zeros(context.batch_size)

        served = ServedPolicy(SteeredPolicy(prior, start=own))
        decide(served, request(served))
        with pytest.raises(MismatchError, match="does not start at a fresh draw"):
            decide(served, request(served, noise=chunk()))


class TestSteering:
    @pytest.mark.parametrize(
        ("said", "direction"),
        [
            ({"axes": [0, 0, -1]}, Direction((0, 0, -1))),
            ({"axes": np.array([1, 0, 0])}, Direction((1, 0, 0))),
            ({"axes": [0, -1.0, 0], "amount": 0.5, "gripper": "close"}, Direction((0, -1, 0), 0.5, "close")),
            ({"axes": [1, 1, 0], "amount": np.float32(0.25), "gripper": "hold"}, Direction((1, 1, 0), 0.25, "hold")),
        ],
    )
    def test_a_direction(
        self, make_served: MakeServed, prior: FlowPolicy, said: dict[str, Any], direction: Direction
    ) -> None:
        served = make_served(method="direct")
        expected = to_reference([direction], prior.action_spec)
        found = request(served, steer=said).reference
        assert found is not None
        torch.testing.assert_close(found.chunk, expected.chunk)
        assert torch.equal(found.steered, expected.steered)

    def test_a_chunk_in_the_units_of_the_actions_that_come_back(self, make_served: MakeServed) -> None:
        """Executed directly, what was asked for comes back."""
        served, wanted = make_served(method="direct"), chunk(3).clip(-2, 2)
        (answer,) = decide(served, request(served, steer=wanted))
        np.testing.assert_allclose(answer.actions, wanted, atol=1e-5)
        (again,) = decide(served, request(served, steer={"chunk": wanted, "units": "environment"}))
        np.testing.assert_allclose(again.actions, wanted, atol=1e-5)

    def test_a_normalised_chunk(self, make_served: MakeServed, prior: FlowPolicy) -> None:
        served, wanted = make_served(method="direct"), chunk(3).clip(-1, 0.5)
        (answer,) = decide(served, request(served, steer={"chunk": wanted, "units": "normalised"}))
        expected = prior.action_spec.denormalise(torch.from_numpy(wanted)).clamp(-2, 2).numpy()
        np.testing.assert_allclose(answer.actions, expected, atol=1e-5)

    def test_a_chunk_for_some_entries(self, make_served: MakeServed) -> None:
        served, wanted = make_served(method="direct"), np.full((HORIZON, DIM), 0.5, np.float32)
        mask = np.zeros((HORIZON, DIM), bool)
        mask[:, 1] = True
        (answer,) = decide(served, request(served, steer={"chunk": wanted, "steered": mask}))
        assert np.isclose(answer.actions, 0.5, atol=1e-5).tolist() == mask.tolist()

    def test_a_deferring_direction_is_the_policy_alone(self, make_served: MakeServed) -> None:
        served, noise = make_served(), chunk(5)
        alone, deferred = decide(
            served, request(served, noise=noise), request(served, noise=noise, steer={"defer": True})
        )
        np.testing.assert_allclose(alone.actions, deferred.actions, atol=1e-6)
        assert np.isnan(deferred.diagnostics["agreement"])

    def test_steering_changes_what_is_done(self, make_served: MakeServed) -> None:
        served = make_served()
        up, down = (
            decide(served, request(served, noise=chunk(5), steer={"axes": [0, 0, sign]}))[0] for sign in (1, -1)
        )
        assert up.actions[:, 2].sum() > down.actions[:, 2].sum()

    @pytest.mark.parametrize("method", ["base", "noise", "action"])
    def test_a_policy_that_does_not_listen_says_so(
        self, make_served: MakeServed, prior: FlowPolicy, method: str
    ) -> None:
        served = (
            make_served(method=method)
            if method == "base"
            else ServedPolicy(steer_learned(prior, regressor(prior, method)))
        )
        assert not served.metadata["steering"]["steerable"]
        with pytest.raises(MismatchError, match=r"does not listen\. .*--steer frs"):
            request(served, steer={"axes": [0, 0, 1]})

    def test_who_listens_is_seen_at_the_ports(self, prior: FlowPolicy) -> None:
        deaf = SteeredPolicy(SteeredPolicy(prior, start=Gaussian()), edit=Limits(-1.0, 1.0))
        assert not ServedPolicy(deaf).steerable
        assert ServedPolicy(SteeredPolicy(SteeredPolicy(prior, start=FlowReversal()), edit=Limits(-1.0, 1.0))).steerable

    def test_a_direction_needs_a_layout(self) -> None:
        served = ServedPolicy(steer(FieldPolicy(lambda x, t, o: -x, ActionSpec(HORIZON, DIM)), "frs"))
        assert not served.metadata["steering"]["directions"]
        with pytest.raises(MismatchError, match="does not say which dimensions move the robot"):
            request(served, steer={"axes": [0, 0, 1]})
        decide(served, request(served, steer=chunk()))


class Pushy:
    """A reasoner that goes up as often as it was asked in this episode, for what it sees."""

    def __init__(self) -> None:
        self.seeds: list[int] = []

    def reset(self, seed: int) -> None:
        self.seeds.append(seed)
        self.asked = 0

    def decide(self, view: Any) -> Direction:
        self.asked += 1
        return Direction((0, 0, 1), min(1.0, self.asked * float(view["height"][0])))


class TestReasoners:
    VIEW = {"height": np.array([0.1])}  # noqa: RUF012

    def steered(self, served: ServedPolicy, session: Session, steer: Any, view: Any = VIEW) -> float:
        """How far up the reasoner wants to go."""
        reference = request(served, session, steer=steer, view=view).reference
        assert reference is not None
        return float(served.action_spec.denormalise(reference.chunk)[0, 0, 2])

    def test_each_client_has_its_own_and_says_when_an_episode_begins(self, make_served: MakeServed) -> None:
        served = make_served(reasoners={"pushy": Pushy})
        mine, other = served.session(), served.session()
        assert self.steered(served, mine, "pushy") == pytest.approx(0.07)
        assert self.steered(served, mine, "pushy") == pytest.approx(0.14)
        assert self.steered(served, other, "pushy") == pytest.approx(0.07)
        assert self.steered(served, mine, {"reasoner": "pushy"}) == pytest.approx(0.21)
        assert self.steered(served, mine, {"reasoner": "pushy", "reset": True}) == pytest.approx(0.07)
        mine.forget()
        assert self.steered(served, mine, "pushy") == pytest.approx(0.07)

    def test_without_a_view_it_sees_the_observation(self, make_served: MakeServed) -> None:
        class Seeing(Pushy):
            def decide(self, view: Any) -> Direction:
                assert list(view) == ["observation"]
                return Direction((0, 0, 1), float(view["observation"].size) / 10)

        served = make_served(reasoners={"seeing": Seeing})
        assert self.steered(served, served.session(), "seeing", None) == pytest.approx(0.7 * SEEN / 10)

    def test_the_scripted_ones_are_there(self, make_served: MakeServed) -> None:
        served = make_served()
        assert "ogbench/cube" in served.metadata["steering"]["reasoners"]
        with pytest.raises(InvalidInputError, match=r"'ogbench/cube' can't use the view: an entry is missing"):
            request(served, steer="ogbench/cube", view=self.VIEW)
        with make_env("ogbench/cube-single-task1", 1, 0, workers=0) as env:
            view = env.reset().view(0)
        reasoner = scripted_reasoner("ogbench/cube-single-task1")
        reasoner.reset(0)
        expected = to_reference([reasoner.decide(view)], served.action_spec)
        found = request(served, steer="ogbench/cube", view=dict(view)).reference
        assert found is not None
        assert expected.active.all()
        torch.testing.assert_close(found.chunk, expected.chunk)

    def test_what_goes_wrong(self, make_served: MakeServed) -> None:
        served = make_served(reasoners={"pushy": Pushy})
        for steer_, view, words in (
            ("push", self.VIEW, "unknown reasoner 'push': did you mean 'pushy'"),
            ("pushy", {}, "it lacks 'height'"),
            ("pushy", {"height": np.zeros(0)}, "has another length"),
            ("pushy", {"height": np.zeros((2, 2))}, r"expected an array \(k,\)"),
            ("pushy", {"height": "high"}, r"expected an array \(k,\)"),
            ("pushy", {"height": np.array([np.nan])}, "NaN"),
            ("pushy", {"height": np.array([5000.0] * 5000)}, r"expected an array \(k,\)"),
            ("pushy", [1], "expected a map of names to arrays"),
            ({"reasoner": 7}, self.VIEW, "by a text"),
            ({"reasoner": "pushy", "reset": 1}, self.VIEW, "by true or false"),
            ({"reasoner": "pushy", "axes": [0, 0, 1]}, self.VIEW, "unknown entry of steer 'axes'"),
        ):
            with pytest.raises(CounterflowError, match=words):
                request(served, steer=steer_, view=view)


class TestBadInput:
    @pytest.mark.parametrize(
        ("message", "error", "words"),
        [
            ([1, 2], InvalidInputError, "is a list; expected a map"),
            (None, InvalidInputError, "is a NoneType; expected a map"),
            ({}, InvalidInputError, r"lacks 'observation'; this policy sees 'observation' \(float32 \(6\)\).*nothing"),
            ({"observations": state()}, UnknownNameError, "did you mean 'observation'"),
            ({"observation": state(), "steeer": 1}, UnknownNameError, "did you mean 'steer'"),
            ({"observation": state()[:5]}, MismatchError, r"has shape \(5,\); this policy sees float32 \(6\)"),
            ({"observation": state()[None]}, MismatchError, r"shape \(1, 6\).*without a batch dimension"),
            ({"observation": np.zeros(6, int)}, InvalidInputError, "is of type int64; this policy sees float32"),
            ({"observation": np.zeros(6, bool)}, InvalidInputError, "is of type bool"),
            ({"observation": "abcdef"}, InvalidInputError, "is of type text"),
            ({"observation": [0.0] * 6}, InvalidInputError, "is a list; expected a numpy array"),
            ({"observation": None}, InvalidInputError, "is a NoneType"),
            ({"observation": np.full(6, np.nan)}, InvalidInputError, "6 values of 6 that are NaN"),
            (
                {"observation": np.array([0, 1, np.inf, 0, 0, 0.0])},
                InvalidInputError,
                "1 values of 6 that are NaN, inf",
            ),
            ({"observation": np.full(6, 1e300)}, InvalidInputError, "too large"),
            ({"observation": {"a": {"b": {"c": {"d": 1}}}}}, InvalidInputError, "maps within maps"),
            ({"x" * 200: 1}, InvalidInputError, "too long"),
            ({"observation": 2**64 - 1}, InvalidInputError, "beyond 64 bits"),
        ],
    )
    def test_observations(
        self, make_served: MakeServed, message: Any, error: type[CounterflowError], words: str
    ) -> None:
        with pytest.raises(error, match=words):
            make_served().read(message)

    @pytest.mark.parametrize(
        ("noise", "error", "words"),
        [
            (chunk()[:2], MismatchError, r"has shape \(2, 4\); this policy's flow starts at \(3, 4\)"),
            (chunk()[:, :3], MismatchError, r"has shape \(3, 3\)"),
            (chunk()[None], MismatchError, r"has shape \(1, 3, 4\)"),
            (chunk().astype(int), InvalidInputError, "is of type int64"),
            (chunk().tolist(), InvalidInputError, "is of type list"),
            (chunk() * np.nan, InvalidInputError, "NaN"),
        ],
    )
    def test_noises(self, make_served: MakeServed, noise: Any, error: type[CounterflowError], words: str) -> None:
        with pytest.raises(error, match=words):
            request(make_served(), noise=noise)

    @pytest.mark.parametrize(
        ("said", "error", "words"),
        [
            (7, InvalidInputError, "steer is a int"),
            ([0, 0, 1], InvalidInputError, "steer is a list"),
            (chunk()[:2], MismatchError, r"chunk has shape \(2, 4\); this policy's chunks are \(3, 4\)"),
            (chunk()[:, :3], MismatchError, r"chunk has shape \(3, 3\)"),
            (chunk() * np.nan, InvalidInputError, "NaN"),
            (chunk() * 1000, InvalidInputError, "expected normalised actions"),
            (chunk().astype(np.int32), InvalidInputError, "is of type int32"),
            ({"chunk": chunk(), "units": "metres"}, InvalidInputError, "units are 'metres'"),
            ({"chunk": chunk(), "steered": np.ones(4, bool)}, InvalidInputError, "a boolean array"),
            ({"chunk": chunk(), "axes": [0, 0, 1]}, UnknownNameError, "unknown entry of steer 'axes'"),
            ({"axis": [0, 0, 1]}, UnknownNameError, "did you mean 'axes'"),
            ({"axes": [0, 1]}, InvalidInputError, "expected three of -1, 0, 1"),
            ({"axes": [0, 0.5, 0]}, InvalidInputError, "expected three of -1, 0, 1"),
            ({"axes": [0, np.nan, 0]}, InvalidInputError, "expected three of -1, 0, 1"),
            ({"axes": "up"}, InvalidInputError, "expected three of -1, 0, 1"),
            ({"axes": [0, 0, 1], "amount": 0}, InvalidInputError, "amount is 0"),
            ({"axes": [0, 0, 1], "amount": float("nan")}, InvalidInputError, "amount is nan"),
            ({"axes": [0, 0, 1], "amount": "much"}, InvalidInputError, "amount is a str"),
            ({"axes": [0, 0, 1], "gripper": "squeeze"}, UnknownNameError, "unknown gripper command"),
            ({"axes": [0, 0, 1], "gripper": 1}, InvalidInputError, "gripper by a text"),
            ({"defer": "yes"}, InvalidInputError, "defer by true or false"),
        ],
    )
    def test_steering(self, make_served: MakeServed, said: Any, error: type[CounterflowError], words: str) -> None:
        with pytest.raises(error, match=words):
            request(make_served(), steer=said)

    def test_ragged_axes(self, make_served: MakeServed) -> None:
        with pytest.raises(InvalidInputError, match="expected three"):
            request(make_served(), steer={"axes": [0, [1], 0]})


class TestExpectations:
    def test_what_it_is(self, make_served: MakeServed, prior: FlowPolicy) -> None:
        belongs = make_served().metadata["belongs"]
        assert belongs["policy"] == prior.fingerprint
        assert {name: belongs[name] for name in binding_of(prior, 4).to_json()} == binding_of(prior, 4).to_json()
        assert belongs["noise_policy"] == ""

    @pytest.mark.parametrize("target", ["noise", "action"])
    def test_the_noise_policy(self, prior: FlowPolicy, target: str) -> None:
        learned = regressor(prior, target)
        assert ServedPolicy(steer_learned(prior, learned)).belongs["noise_policy"] == learned.fingerprint

    def test_the_action_space_has_a_fingerprint(self, prior: FlowPolicy) -> None:
        def of(**changes: Any) -> str:
            spec = prior.action_spec
            own = {name: getattr(spec, name) for name in ("horizon", "dim", "low", "high", "normaliser", "layout")}
            policy = FieldPolicy(lambda x, t, o: -x, ActionSpec(**{**own, **changes}))
            return str(ServedPolicy(policy).belongs["action_space"])

        other = Normaliser(torch.zeros(4), torch.full((4,), 0.7))
        changed = [of(), of(horizon=4), of(low=None), of(layout=None), of(normaliser=None), of(normaliser=other)]
        assert len(set(changed)) == len(changed)
        assert of() == of()

    def test_agreement_and_refusal(self, make_served: MakeServed, prior: FlowPolicy) -> None:
        served = make_served()
        request(served, expect={"policy": prior.fingerprint, "horizon": 3, "noise_policy": ""})
        request(served, expect={"horizon": "3"})
        for expected, error, words in (
            ({"policy": "0123"}, MismatchError, f"policy '0123', and this server has '{prior.fingerprint}'"),
            ({"noise_policy": "0123"}, MismatchError, "noise_policy '0123'"),
            ({"horizon": 5}, MismatchError, "horizon '5', and this server has '3'"),
            ({"polcy": "0123"}, UnknownNameError, "did you mean 'policy'"),
            ("0123", InvalidInputError, "expect is a str"),
        ):
            with pytest.raises(error, match=words):
                request(served, expect=expected)


class Seeing(FieldPolicy):
    """Sees cameras, a state and a sentence."""

    observation_entries = {  # noqa: RUF012
        "cameras/wrist": ObservationEntry("uint8", (None, None, 3)),
        "state": ObservationEntry("float32", (2,)),
        "prompt": ObservationEntry("text"),
        "extra": ObservationEntry("float32", (1,), optional=True),
    }

    def __init__(self) -> None:
        super().__init__(lambda x, t, c: c[:, None, None] - x, ActionSpec(HORIZON, DIM))
        self.seen: list[dict[str, Any]] = []

    def encode(self, observation: dict[str, Any]) -> torch.Tensor:
        self.seen.append(observation)
        lengths = torch.tensor([float(len(prompt)) for prompt in observation["prompt"]])
        return observation["cameras/wrist"].float().flatten(1).mean(1) + observation["state"].sum(1) + lengths


class TestDictionaries:
    def message(self, **changes: Any) -> dict[str, Any]:
        message = {
            "cameras": {"wrist": np.full((4, 5, 3), 7, np.uint8)},
            "state": np.array([1.0, 2.0]),
            "prompt": "pick",
            **changes,
        }
        return {name: value for name, value in message.items() if value is not None}

    def test_a_batch_of_them(self) -> None:
        policy = Seeing()
        served = ServedPolicy(steer(policy, "rank"))
        requests = [
            served.complete(served.read(self.message(prompt=prompt, noise=chunk())), served.session())
            for prompt in ("pick", "place it")
        ]
        first, second = decide(served, *requests)
        assert len(policy.seen) == 1
        assert policy.seen[0]["prompt"] == ["pick", "place it"]
        assert policy.seen[0]["cameras/wrist"].shape == (2, 4, 5, 3)
        assert policy.seen[0]["cameras/wrist"].dtype == torch.uint8
        assert policy.seen[0]["state"].dtype == torch.float32
        np.testing.assert_allclose(decide(served, requests[0])[0].actions, first.actions, atol=1e-5)
        assert not np.allclose(first.actions, second.actions)

    def test_only_those_of_the_same_shape_share_a_batch(self) -> None:
        served = ServedPolicy(Seeing())

        def signature(**changes: Any) -> Any:
            return served.complete(served.read(self.message(**changes)), served.session()).signature

        assert signature() == signature(prompt="something else", state=np.array([5.0, 6.0], np.float16))
        assert signature() != signature(cameras={"wrist": np.zeros((5, 4, 3), np.uint8)})
        assert signature() != signature(extra=np.zeros(1))

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"prompt": None}, r"lacks 'prompt'; .*'cameras/wrist' \(uint8 \(any, any, 3\)\)"),
            ({"prompt": 7}, "is of type int64; this policy sees text"),
            ({"cameras": {"wrist": np.zeros((4, 5, 3), np.float32)}}, "is of type float32; this policy sees uint8"),
            ({"cameras": {"wrist": np.zeros((3, 4, 5), np.uint8)}}, r"has shape \(3, 4, 5\)"),
            ({"cameras": {"wrist": np.zeros((4, 5), np.uint8)}}, r"has shape \(4, 5\)"),
            ({"cameras": {"rist": np.zeros((4, 5, 3), np.uint8)}}, "did you mean 'cameras/wrist'"),
        ],
    )
    def test_bad_ones(self, changes: dict[str, Any], words: str) -> None:
        served = ServedPolicy(Seeing())
        served.read(self.message())
        with pytest.raises(CounterflowError, match=words):
            served.read(self.message(**changes))

    def test_a_policy_that_declares_nothing_takes_what_it_is_given(self) -> None:
        seen: list[Any] = []

        def encode(observation: Any) -> torch.Tensor:
            seen.append(observation)
            return torch.zeros(1)

        served = ServedPolicy(FieldPolicy(lambda x, t, c: -x, ActionSpec(HORIZON, DIM), encode))
        assert served.metadata["observation"] is None
        decide(served, request(served))
        assert seen[-1].shape == (1, SEEN)
        decide(served, request(served, flag=True))
        assert {name: tuple(value.shape) for name, value in seen[-1].items()} == {
            "observation": (1, SEEN),
            "flag": (1,),
        }
        with pytest.raises(InvalidInputError, match="without an observation"):
            served.read({"noise": chunk()})

    def test_reserved_names_and_bad_declarations(self) -> None:
        class Noisy(Seeing):
            observation_entries = {"noise": ObservationEntry()}  # noqa: RUF012

        with pytest.raises(InvalidInputError, match="an entry called 'noise'"):
            ServedPolicy(Noisy())
        with pytest.raises(InvalidInputError, match="has type 'picture'"):
            ObservationEntry("picture")
        with pytest.raises(InvalidInputError, match="expected positive sizes"):
            ObservationEntry("float32", (0,))
        with pytest.raises(InvalidInputError, match="none for text"):
            ObservationEntry("text", (3,))


class Trained(FieldPolicy):
    """Sees an image as it was trained on, and a task."""

    observation_entries = {  # noqa: RUF012
        "top": ObservationEntry("image", (3, None, None)),
        "task": ObservationEntry("text"),
    }

    def __init__(self) -> None:
        super().__init__(lambda x, t, c: c[:, None, None] - x, ActionSpec(HORIZON, DIM))
        self.seen: list[dict[str, Any]] = []

    def encode(self, observation: dict[str, Any]) -> torch.Tensor:
        self.seen.append(observation)
        return observation["top"].flatten(1).mean(1)


class TestImages:
    def test_bytes_as_cameras_give_them_become_what_the_policy_sees(self) -> None:
        policy = Trained()
        served = ServedPolicy(policy, names={"cameras/wrist": "top"})
        image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
        sent = {"cameras": {"wrist": image}, "prompt": "pick"}
        decide(served, served.complete(served.read(sent), served.session()))
        expected = torch.from_numpy(image).permute(2, 0, 1).float() / 255
        torch.testing.assert_close(policy.seen[0]["top"][0], expected)
        assert policy.seen[0]["task"] == ["pick"]
        assert served.metadata["observation"]["top"]["dtype"] == "image"

    def test_what_is_right_already_stays(self) -> None:
        policy = Trained()
        served = ServedPolicy(policy)
        for image in (np.full((3, 4, 5), 51, np.uint8), np.full((3, 4, 5), 0.2)):
            decide(served, served.complete(served.read({"top": image, "task": "pick"}), served.session()))
        for seen in policy.seen:
            torch.testing.assert_close(seen["top"], torch.full((1, 3, 4, 5), 0.2))

    @pytest.mark.parametrize(
        ("image", "words"),
        [
            (np.zeros((4, 5), np.uint8), "bytes"),
            (np.zeros((4, 5, 4), np.uint8), "bytes"),
            (np.zeros((4, 5, 3), np.float32), "bytes"),
            (np.zeros((3, 4, 5), np.int64), "bytes"),
            ("a picture", "a text"),
            (np.full((3, 4, 5), 1.5), "expected 0 to 1"),
            (np.full((3, 4, 5), -0.1), "expected 0 to 1"),
        ],
    )
    def test_bad_ones(self, image: Any, words: str) -> None:
        with pytest.raises(CounterflowError, match=words):
            ServedPolicy(Trained()).read({"top": image, "task": "pick"})

    def test_names_that_the_policy_does_not_have(self) -> None:
        with pytest.raises(UnknownNameError, match="did you mean 'top'"):
            ServedPolicy(Trained(), names={"wrist": "tpo"})


class TestPadding:
    """A policy whose flow moves two dimensions more than are executed, and a row that is over."""

    def served(self, **spec: Any) -> ServedPolicy:
        padded = ActionSpec(HORIZON, DIM, padding=2, past=1, **spec)
        return ServedPolicy(steer(FieldPolicy(lambda x, t, o: -x, padded), "frs"))

    def test_noise_has_it_and_actions_do_not(self) -> None:
        served = self.served()
        noise = np.full((HORIZON, DIM + 2), 0.5, np.float32)
        (answer,) = decide(served, request(served, noise=noise))
        assert answer.actions.shape == (HORIZON - 1, DIM)
        np.testing.assert_array_equal(answer.noise, noise)
        assert served.metadata["actions"]["horizon"] == HORIZON - 1
        with pytest.raises(MismatchError, match="with padding"):
            served.read({"observation": np.zeros(SEEN), "noise": noise[:, :DIM]})

    def test_chunks_in_either_unit_share_a_batch(self) -> None:
        served = self.served(normaliser=Normaliser.fit(torch.tensor([[-2.0] * DIM, [2.0] * DIM]), "min_max"))
        chunk = np.full((HORIZON, DIM), 0.4, np.float32)
        mask = np.ones(chunk.shape, bool)
        in_units, normalised, alone = decide(
            served,
            request(served, steer={"chunk": 2 * chunk, "steered": mask}),
            request(served, steer={"chunk": chunk, "units": "normalised"}),
            request(served),
        )
        np.testing.assert_allclose(in_units.actions, normalised.actions, atol=1e-5)
        assert not np.allclose(alone.actions, normalised.actions)

    def test_noise_of_a_uniform_prior(self) -> None:
        served = ServedPolicy(FieldPolicy(lambda x, t, o: -x, ActionSpec(HORIZON, DIM, prior="uniform")))
        noise = np.linspace(-0.99, 0.99, HORIZON * DIM, dtype=np.float32).reshape(HORIZON, DIM)
        (answer,) = decide(served, request(served, noise=noise))
        np.testing.assert_allclose(answer.noise, noise, atol=1e-5)
        with pytest.raises(InvalidInputError, match="uniform"):
            served.read({"observation": np.zeros(SEEN), "noise": 2 * noise})


def test_the_seed_of_a_request_is_that_of_its_draws(make_served: MakeServed) -> None:
    served = make_served(method="base")
    one = request(served)
    (answer,) = decide(served, one)
    expected = torch.randn(1, HORIZON, DIM, generator=generator(one.seed))[0]
    np.testing.assert_array_equal(answer.noise, expected.numpy())
