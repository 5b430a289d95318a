"""Rollouts and evaluation in the real simulator: repeatable, independent of how they are batched, accounted for."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from counterflow.envs import VectorEnv, expand_tasks, make_env
from counterflow.errors import InvalidInputError, MismatchError, UnknownNameError
from counterflow.experiments.compare import Contender, comparison_of
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, policy_name
from counterflow.policies import ActionLayout, ActionSpec, FieldPolicy
from counterflow.random import child_seed
from counterflow.steering import MethodSettings

TASK = "ogbench/cube-single-task4"


@pytest.fixture(scope="module")
def env() -> Any:
    with make_env(TASK, 3, workers=1) as made:
        yield made


def outcomes(
    env: VectorEnv, method: str = "frs", episodes: int = 4, seed: int = 0, **reasoner: Any
) -> list[dict[str, Any]]:
    found = evaluate(env, load_prior(TASK), method, episodes, seed, reasoner=ReasonerSettings(**reasoner))
    return found.outcomes


class TestRepeatability:
    def test_the_number_of_environments_and_processes_changes_nothing(self, env: VectorEnv) -> None:
        expected = outcomes(env, "partial", error=0.3)
        with make_env(TASK, 4, workers=2) as wide, make_env(TASK, 1) as single:
            assert outcomes(wide, "partial", error=0.3) == expected
            assert outcomes(single, "partial", error=0.3) == expected
        assert outcomes(env, "partial", error=0.3) == expected

    def test_everything_but_the_time_it_took_is_the_same_again(self, env: VectorEnv) -> None:
        first, again = (evaluate(env, load_prior(TASK), "frs", 3, 1).to_json() for _ in range(2))
        assert first.pop("seconds") != again.pop("seconds")
        assert first == again

    def test_episodes_are_the_seeds_and_methods_share_them(self, env: VectorEnv) -> None:
        expected = [child_seed(7, "episode", index) for index in range(2)]
        for method in ("frs", "direct"):
            assert [one["seed"] for one in outcomes(env, method, 2, 7)] == expected

    def test_more_episodes_begin_with_the_same(self, env: VectorEnv) -> None:
        assert outcomes(env, episodes=5)[:3] == outcomes(env, episodes=3)


class TestAccounting:
    def test_the_ledger(self, env: VectorEnv) -> None:
        found = evaluate(env, load_prior(TASK), "frs", 3, 0, settings=MethodSettings(reversal_steps=4))
        content = found.to_json()
        chunks = content["ledger"]["reasoner_queries"]
        assert content["ledger"]["field_evaluations"] == 8 * chunks
        assert 5 * (chunks - 3) < content["ledger"]["environment_steps"] <= 5 * chunks
        assert content["ledger"]["environment_steps"] == sum(one["steps"] for one in content["outcomes"])
        assert content["successes"] == sum(one["success"] for one in content["outcomes"])
        assert 0.5 < content["diagnostics"]["agreement"] <= 1
        assert content["settings"]["reversal_steps"] == 4
        assert content["policy"] == load_prior(TASK).fingerprint  # type: ignore[attr-defined]

    def test_the_json_holds_what_is_promised_and_is_strictly_json(self, env: VectorEnv) -> None:
        content = json.loads(json.dumps(evaluate(env, load_prior(TASK), "base", 2, 3).to_json(), allow_nan=False))
        promised = {"env", "steer", "episodes", "successes", "success_rate", "ci95", "seconds"}
        assert promised < set(content)
        assert (content["env"], content["steer"], content["episodes"], content["seed"]) == (TASK, "base", 2, 3)
        assert content["success_rate"] == content["successes"] / 2
        low, high = content["ci95"]
        assert 0 <= low <= content["success_rate"] <= high <= 1
        assert content["seconds"] > 0
        assert content["settings"] == {"steps": 10}

    def test_the_base_asks_nobody(self, env: VectorEnv) -> None:
        content = evaluate(env, load_prior(TASK), "base", 1, 0).to_json()
        assert content["ledger"]["reasoner_queries"] == 0
        assert content["diagnostics"]["agreement"] is None


class TestRefusals:
    def test_a_policy_that_does_not_fit(self, env: VectorEnv) -> None:
        with pytest.raises(MismatchError, match="sees 40 numbers"):
            evaluate(env, load_prior(TASK, "scene"), "frs", 1, 0)
        seven = FieldPolicy(lambda x, t, o: x, ActionSpec(5, 7, layout=ActionLayout((0, 1, 2))))
        with pytest.raises(MismatchError, match="acts in 7 dimensions"):
            evaluate(env, seven, "frs", 1, 0)

    @pytest.mark.parametrize(("episodes", "seed"), [(0, 0), (-1, 0), (100_001, 0), (2.5, 0), (1, -1)])
    def test_numbers_out_of_range(self, env: VectorEnv, episodes: Any, seed: int) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            evaluate(env, load_prior(TASK), "frs", episodes, seed)

    @pytest.mark.parametrize(
        ("method", "settings", "reasoner"),
        [
            ("frs", {"reversal_steps": 0}, {}),
            ("partial", {"tau": 1.0}, {}),
            ("partial", {"steps": 0}, {}),
            ("rank", {"candidates": 0}, {}),
            ("frs", {}, {"error": 1.5}),
            ("frs", {}, {"delay": -1}),
            ("frs", {}, {"magnitude": 0.0}),
            ("frs", {}, {"magnitude": float("nan")}),
        ],
    )
    def test_settings_out_of_range(
        self, env: VectorEnv, method: str, settings: dict[str, Any], reasoner: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidInputError, match="expected"):
            evaluate(
                env,
                load_prior(TASK),
                method,
                1,
                0,
                settings=MethodSettings(**settings),
                reasoner=ReasonerSettings(**reasoner),
            )

    def test_unknown_names(self, env: VectorEnv) -> None:
        with pytest.raises(UnknownNameError, match="frs"):
            evaluate(env, load_prior(TASK), "fsr", 1, 0)
        with pytest.raises(InvalidInputError, match="ogbench, paper"):
            evaluate(env, load_prior(TASK), "frs", 1, 0, reasoner=ReasonerSettings(convention="papers"))
        with pytest.raises(UnknownNameError, match="ogbench/scene"):
            expand_tasks(["ogbench/sceen"])
        with pytest.raises(InvalidInputError, match="no task"):
            expand_tasks([])


def test_your_own_module_is_evaluated_like_a_shipped_prior(env: VectorEnv) -> None:
    """A policy that is nothing but a function: it stands still, so direct execution of references is what moves."""
    layout = ActionLayout((0, 1, 2), (3,), 4)
    still = FieldPolicy(lambda x, t, o: -x, ActionSpec(5, 5, (-1.0,) * 5, (1.0,) * 5, layout=layout))
    assert policy_name(still) == still.fingerprint
    found = evaluate(env, still, "direct", 2, 0)
    assert found.agreement == pytest.approx(1.0)
    assert torch.tensor(found.round_trip_error) == 0


def test_families_stand_for_their_tasks() -> None:
    assert expand_tasks(["ogbench/scene", "ogbench/scene-task2"]) == [
        f"ogbench/scene-task{task}" for task in range(1, 6)
    ]


def test_means_of_families() -> None:
    results = [
        {"label": "x", "env": f"ogbench/{family}-task{task}", "successes": successes, "episodes": 10}
        for family, task, successes in (("scene", 1, 10), ("scene", 2, 0), ("cube-single", 1, 4))
    ]
    comparison = comparison_of(results)
    assert comparison.mean("x", "ogbench/scene").rate == 0.5
    assert comparison.mean("x").rate == pytest.approx(14 / 30)
    assert Contender("a", "base") == Contender("a", "base")
