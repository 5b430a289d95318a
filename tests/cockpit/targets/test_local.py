"""Policies that are here: objects with a field, some without a flow, generalists."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.cockpit.session import Session, SessionSettings
from counterflow.cockpit.targets import METHODS, LocalTarget
from counterflow.envs import describe
from counterflow.errors import InvalidInputError, MismatchError
from counterflow.policies import (
    ActionSpec,
    BasePolicy,
    FieldPolicy,
    GeneralistConfig,
    GeneralistPolicy,
    Normaliser,
)
from counterflow.steering import ChunkRegressor, MethodSettings

TASK = "ogbench/cube-single-task1"
MakeSession = Callable[..., Session]
Hold = Callable[..., float]
SETTINGS = MethodSettings(candidates=8)


def test_an_object_with_a_field_is_driven_kept_and_learned_from(
    make_session: MakeSession, make_person: Any, prior: BasePolicy, tmp_path: Path
) -> None:
    policy = FieldPolicy(lambda x, t, seen: prior.velocity(seen, x, t), prior.action_spec, prior.encode, name="mine")
    session = make_session(policy=policy)
    session.resume()
    for _ in range(2):
        assert make_person(session).solve()
        session.begin()
    session.start_training()
    session.advance(0.0)
    assert session.describe()["training"]["state"] == "done"
    learned = ChunkRegressor.load(tmp_path / "run" / "policies" / "noise-policy-1")
    assert learned.config.inputs == "observation"  # it offers no features
    assert learned.binding.policy == policy.fingerprint
    session.choose(method="dsbc", pilot="policy")
    session.control.report([], 0.0)
    session.advance(0.0)
    assert session.is_moving


def test_an_object_that_does_not_say_what_its_actions_do(make_session: MakeSession, prior: BasePolicy) -> None:
    spec = prior.action_spec
    policy = FieldPolicy(lambda x, t, _: -x, ActionSpec(spec.horizon, spec.dim, spec.low, spec.high))
    with pytest.raises(MismatchError, match="Give its ActionSpec a layout"):
        make_session(policy=policy)


def test_a_policy_without_a_flow_is_only_watched(make_session: MakeSession, prior: BasePolicy) -> None:
    policy = FieldPolicy(lambda x, t, _: -x, prior.action_spec)
    policy.has_flow = False  # type: ignore[attr-defined]
    target = LocalTarget(policy, TASK)
    assert [method for method in METHODS if not target.lacks(method)] == ["base"]
    target.check(SETTINGS)
    assert target.binding is None
    with pytest.raises(InvalidInputError, match="no flow to steer"):
        make_session(policy=policy, method="frs")


def test_a_generalist_is_told_of_each_task(tmp_path: Path, hold: Hold) -> None:
    pytest.importorskip("metaworld", reason="Meta-World is not installed: counterflow[metaworld]")
    first, second = "metaworld/drawer-close-v3", "metaworld/handle-press-v3"
    spec = describe(first)
    assert spec.observation_layout is not None
    robot, object_ = len(spec.observation_layout.robot), spec.observation_layout.object_dim
    torch.manual_seed(0)
    config = GeneralistConfig(width=16, encoder_depth=1, depth=1, heads=2, name_dim=8, sentence_dim=12, max_objects=4)
    scale = Normaliser(torch.zeros(object_ + 3), torch.ones(object_ + 3))
    actions = ActionSpec(4, spec.action_dim, spec.action_low, spec.action_high, layout=spec.action_layout)
    policy = GeneralistPolicy(config, Normaliser(torch.zeros(robot), torch.ones(robot)), scale, actions, "metaworld")
    session = Session(SessionSettings(first, tmp_path, policy=policy.requires_grad_(False).eval(), size=64, workers=0))
    try:
        for task in (first, second):
            if task != first:
                session.go_to(task)
            assert isinstance(session.target, LocalTarget)
            session.resume()
            hold(session, "up")
            assert session.episode.steps == 5
            expected = policy.for_task(describe(task).task, describe(task).observation_layout)
            given = session.target.policy.encode(torch.from_numpy(session.simulator.batch.observation))
            for name, value in expected.encode(torch.from_numpy(session.simulator.batch.observation)).items():
                torch.testing.assert_close(given[name], value)
        session._finish()
        session.keep()
        session.advance(0.0)
        assert [note["kind"] for note in session.notes] == ["done"], session.notes
    finally:
        session.close()
