"""Policies on servers (real ones, over real websockets)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("msgpack", reason="policy servers need the extra 'serve'")
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as serve_websocket

from counterflow.binding import Binding
from counterflow.cockpit.session import Session, SessionSettings
from counterflow.cockpit.targets import METHODS, Request, ServedTarget, Target, open_target
from counterflow.data import SteeringDataset
from counterflow.envs import describe
from counterflow.errors import InvalidInputError, MismatchError, ServingError
from counterflow.flow import denoise
from counterflow.policies import (
    BasePolicy,
    FieldPolicy,
    Normaliser,
    bind,
)
from counterflow.random import RowGenerators
from counterflow.reasoners import Direction, to_reference
from counterflow.serving import PolicyServer, ServedPolicy, ServerSettings, pack, running, unpack
from counterflow.steering import ChunkRegressor, Intention, MethodSettings, binding_of, steer

TASK = "ogbench/cube-single-task1"
MakeSession = Callable[..., Session]
Hold = Callable[..., float]
SETTINGS = MethodSettings(candidates=8)


@contextmanager
def serving(policy: BasePolicy, method: str = "frs", port: int = 0) -> Iterator[PolicyServer]:
    steered = steer(policy, method, SETTINGS)
    with running(ServedPolicy(steered, name="cube-single", method=method), ServerSettings(port=port)) as server:
        yield server


@contextmanager
def foreign_server(answer: Callable[[Any], Any]) -> Iterator[str]:
    """A server of openpi's protocol that says nothing of its policy."""

    def meet(connection: ServerConnection) -> None:
        connection.send(pack({}))
        for message in connection:
            connection.send(pack(answer(unpack(message))))  # type: ignore[arg-type]

    with serve_websocket(meet, "127.0.0.1", 0, compression=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


def at(server: PolicyServer) -> str:
    return server.url.replace("ws://", "serve://")


def act(target: Target, method: str, reference: Any = None, learned: Any = None) -> Any:
    observation = np.full((1, describe(TASK).observation_dim), 0.1, np.float32)
    return target.act(Request(method, SETTINGS, learned, observation, reference, RowGenerators([0])))


def offered(target: Target) -> list[str]:
    return [method for method in METHODS if not target.lacks(method)]


class TestACounterflowServer:
    def test_the_whole_loop(
        self, make_session: MakeSession, make_person: Any, prior: BasePolicy, tmp_path: Path
    ) -> None:
        """Drive to successes, keep, train, let the noise policy drive the server's flow, help it, train again."""
        with serving(prior) as server:
            session = make_session(policy=at(server))
            assert session.helm.choice.method == "frs"
            assert server.url in session.describe()["target"]
            session.resume()
            for _ in range(2):
                assert make_person(session).solve()
                session.begin()
            session.advance(0.0)
            dataset = SteeringDataset.load(tmp_path / "run" / "recordings")
            assert dataset.binding == binding_of(prior, 5)
            for episode in dataset:
                arrays = episode.arrays
                with torch.no_grad():  # the noises are the server's own: they give what was executed
                    field = bind(prior, prior.encode(torch.from_numpy(arrays["observations"])))
                    made = denoise(field, torch.from_numpy(arrays["noise"]), 5).clamp(-1, 1).numpy()
                np.testing.assert_allclose(made, arrays["chunks"], atol=1e-3)
                assert arrays["active"].all()
                assert (arrays["start_time"] == 0).all()
            session.start_training()
            session.advance(0.0)
            told = session.describe()
            assert (told["training"]["state"], told["training"]["algorithm"]) == ("done", "dsbc"), told["training"]
            learned = ChunkRegressor.load(tmp_path / "run" / "policies" / "noise-policy-1")
            assert learned.config.inputs == "observation"

            session.choose(method="dsbc", noise_policy="noise-policy-1", pilot="policy")
            session.control.report([], 100.0)
            session.advance(100.0)
            session.control.report([], 100.0)
            session.advance(100.0)
            assert session.chunk is not None
            with torch.no_grad():
                seen = torch.from_numpy(session.chunk.observation[None])
                noise = learned(seen)
                expected = denoise(bind(prior, prior.encode(seen)), noise, 5).clamp(-1, 1)[0].numpy()
            np.testing.assert_allclose(session.chunk.plan.noise, noise, atol=1e-5)
            np.testing.assert_allclose(session.chunk.plan.chunk[0], expected, atol=1e-3)
            assert make_person(session).solve()
            session.begin()
            session.advance(0.0)
            (helped,) = SteeringDataset.load(tmp_path / "run" / "corrections")
            usable, executed = helped.arrays["step_noise_valid"], helped.arrays["executed"]
            assert usable.sum() == (executed == 5).sum() > 0
            np.testing.assert_array_equal(helped.arrays["step_noise"][usable], helped.arrays["noise"][executed == 5])
            session.start_training()
            session.advance(0.0)
            training = session.describe()["training"]
            assert (training["state"], training["algorithm"]) == ("done", "dagger"), training
            again = make_session(policy=at(server))  # and what was learned is there the next time
            assert list(again.noise_policies.learned) == ["noise-policy-1", "noise-policy-2"]

    @pytest.mark.parametrize(
        ("method", "expected", "first"),
        [
            ("frs", ["base", "direct", "rank", "frs", "dsbc"], "frs"),
            ("partial", ["base", "direct", "partial", "rank", "dsbc"], "partial"),
            ("base", ["base", "direct", "rank", "dsbc"], "rank"),
        ],
    )
    def test_what_is_offered_depends_on_how_it_was_started(
        self, prior: BasePolicy, method: str, expected: list[str], first: str
    ) -> None:
        with serving(prior, method) as server:
            target = ServedTarget(at(server), TASK)
            assert offered(target) == expected
            assert target.preferred == first
            if method == "base":
                assert "--steer frs" in target.lacks("frs")
            target.close()

    def test_what_is_not_offered_is_refused_with_the_reason(self, make_session: MakeSession, prior: BasePolicy) -> None:
        with serving(prior, "base") as server:
            session = make_session(policy=at(server))
            before = session.describe()
            for wrong, match in (
                ({"method": "frs"}, "--steer frs"),
                ({"method": "guided"}, "on the server"),
                ({"method": "dsbc"}, "no noise policy yet"),
                ({"reversal_steps": 3}, "where the policy runs"),
                ({"candidates": 0}, "candidates|rank n"),
            ):
                with pytest.raises(InvalidInputError, match=match):
                    session.choose(**wrong)  # type: ignore[arg-type]
            assert session.describe() == before
            assert {one["name"] for one in before["methods"] if one["lacks"]} == {"frs", "partial", "dsbc", "guided"}
            with pytest.raises(InvalidInputError, match="--steer frs"):
                make_session(policy=at(server), method="frs")
            with pytest.raises(InvalidInputError, match="without --critic"):
                open_target(at(server), TASK, "cpu", 5, critic=object())  # type: ignore[arg-type]

    def test_methods_do_what_they_say(self, prior: BasePolicy) -> None:
        with serving(prior) as server:
            target = ServedTarget(at(server), TASK)
            reference = to_reference([Direction((0, 0, 1), 1.0, "open")], target.action_spec)
            direct = act(target, "direct", reference)
            spoken = reference.spoken[0]
            np.testing.assert_allclose(direct.plan.chunk[0][spoken], reference.chunk[0][spoken], atol=1e-5)
            assert not direct.reusable
            own = steer(prior, "frs", SETTINGS).act(
                torch.full((1, describe(TASK).observation_dim), 0.1), reference, RowGenerators([0])
            )
            steered = act(target, "frs", reference)
            np.testing.assert_allclose(steered.plan.chunk, own.chunk, atol=1e-3)
            assert steered.reusable
            ranked, base = act(target, "rank", reference), act(target, "base")
            assert ranked.plan.agreement > 0.2
            assert torch.isnan(base.plan.agreement).all()
            assert ranked.reusable
            assert target.fan(np.full(describe(TASK).observation_dim, 0.1, np.float32), SETTINGS, 0).shape == (12, 5, 5)
            target.close()

    def test_a_noise_policy_chooses_for_itself(self, prior: BasePolicy, make_session: MakeSession) -> None:
        from counterflow.steering import steer_learned

        binding = binding_of(prior, 5)
        dim = describe(TASK).observation_dim
        regressor = make_regressor(binding, dim)
        served = ServedPolicy(steer_learned(prior, regressor), method="dsbc")
        with running(served, ServerSettings(port=0)) as server:
            target = ServedTarget(at(server), TASK)
            assert offered(target) == ["base", "direct"]
            assert "same chunk" in target.lacks("rank")
            assert target.preferred == "base"
            assert act(target, "base").reusable  # it tells where its flow started
            target.close()

    def test_noise_policies_of_others_are_refused(self, prior: BasePolicy) -> None:
        dim = describe(TASK).observation_dim
        with serving(prior) as server:
            target = ServedTarget(at(server), TASK)
            target.check_learned(make_regressor(binding_of(prior, 5), dim))
            with pytest.raises(MismatchError, match="steps 10, not 5"):
                target.check_learned(make_regressor(binding_of(prior, 10), dim))
            with pytest.raises(MismatchError, match="features, of which a server tells nothing"):
                target.check_learned(make_regressor(binding_of(prior, 5), dim, inputs="features"))
            intending = make_regressor(binding_of(prior, 5), dim)
            intending.config = replace(intending.config, intention=Intention())
            with pytest.raises(MismatchError, match="has an intention, which needs the gradient"):
                target.check_learned(intending)
            target.close()

    def test_one_that_goes_away_pauses_and_one_that_comes_back_is_driven_again(
        self, make_session: MakeSession, prior: BasePolicy, hold: Hold
    ) -> None:
        with serving(prior) as server:
            port = int(server.url.rsplit(":", 1)[1])
            session = make_session(policy=at(server))
            session.resume()
            now = hold(session, "up")
        now = hold(session, "up", now=now)
        assert session.state == "paused"
        assert "went away" in session.reason or "can't be reached" in session.reason
        assert session.episode.steps == 5
        with serving(prior, port=port):
            session.resume()
            now = hold(session, "up", now=now)
            assert session.episode.steps == 10
        other = FieldPolicy(lambda x, t, _: -x, prior.action_spec, name="another")
        with serving(other, port=port):
            session.resume()
            hold(session, "up", now=now)
            session.resume()
            hold(session, "up", now=now)
            assert "expects policy" in session.reason
            assert session.episode.steps == 10

    def test_samples_are_asked_for_beside_the_driving(
        self, make_session: MakeSession, prior: BasePolicy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with serving(prior) as server, ThreadPoolExecutor(1) as pool:
            session = make_session(policy=at(server))
            monkeypatch.setattr(session.picture, "questions", pool)
            let = threading.Event()
            first: Future[Any] = pool.submit(let.wait)  # nothing in the background gets anywhere
            session.resume()
            session.control.report(["left"], 0.0)
            assert [session.advance(0.0) for _ in range(3)] == [True] * 3
            assert session.frame is not None
            assert "fan" not in session.frame.overlay
            let.set()
            first.result(30)
            assert session.picture.sampling is not None
            session.picture.sampling.answer.result(30)
            session.advance(0.0)
            assert len(session.frame.overlay["fan"]) == 12

    def test_a_server_of_its_own_process(self, prior: BasePolicy) -> None:
        command = [sys.executable, "-m", "counterflow.cli", "serve", "cube-single", "--port", "0"]
        environment = {**os.environ, "COUNTERFLOW_API_KEY": "a-key-that-is-long"}
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        try:
            assert process.stdout is not None
            address = next(found[0] for line in process.stdout if (found := re.search(r"ws://[\d.]+:\d+", line)))
            with pytest.raises(ServingError, match="401"):
                ServedTarget(address, TASK)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("COUNTERFLOW_API_KEY", "a-key-that-is-long")
                target = ServedTarget(address, TASK)
            assert target.binding == binding_of(prior, 5)
            assert act(target, "base").reusable
            target.close()
        finally:
            process.terminate()
            process.wait(30)

    def test_nobody_there(self, tmp_path: Path) -> None:
        with pytest.raises(ServingError, match=r"can't be reached.*Is the server running"):
            Session(SessionSettings(TASK, tmp_path, policy="serve://127.0.0.1:9"))


def make_regressor(binding: Binding, dim: int, inputs: Any = "observation") -> ChunkRegressor:
    from counterflow.steering import RegressorConfig

    size = binding.horizon * binding.dim
    config = RegressorConfig(members=1, width=8, inputs=inputs)
    normalisers = (Normaliser(torch.zeros(one), torch.ones(one)) for one in (dim, size))
    return ChunkRegressor(config, *normalisers, binding)


class TestAServerOfOthers:
    def test_it_is_driven_from_outside_and_nothing_is_kept(
        self, make_session: MakeSession, tmp_path: Path, hold: Hold
    ) -> None:
        rng = np.random.default_rng(0)
        seen: list[Any] = []

        def answer(message: Any) -> Any:
            seen.append(message)
            return {"actions": rng.uniform(-1, 1, (4, 5)).astype(np.float32)}

        with foreign_server(answer) as address:
            session = make_session(policy=address)
            assert offered(session.target) == ["base", "direct", "rank"]
            assert session.helm.choice.method == "rank"
            session.resume()
            hold(session, "up", actions=4)
            assert session.episode.steps == 4
            assert len(seen) == 1 + 16 + 12  # its size, the candidates, the fan
            assert {frozenset(message) for message in seen} == {frozenset({"observation"})}
            assert session.episode.decisions[0].start_time == 1.0
            session._finish()
            with pytest.raises(MismatchError, match="can't be kept"):
                session.keep()
            with pytest.raises(MismatchError, match="no training"):
                session.start_training()
            session.begin()  # undecided: counted, and not kept
            told = session.describe()
            assert not told["keeps"]
            assert told["tallies"][0]["episodes"] == 1
            assert not (tmp_path / "run" / "recordings").exists()

    def test_one_for_another_robot(self) -> None:
        with (
            foreign_server(lambda _: {"actions": np.zeros((4, 7), np.float32)}) as address,
            pytest.raises(MismatchError, match="actions of 7 numbers"),
        ):
            ServedTarget(address, TASK)
