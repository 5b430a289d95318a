"""Comparisons that go on where they stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from counterflow.experiments import compare as module
from counterflow.experiments.compare import Contender, compare
from counterflow.experiments.evaluate import Evaluation
from counterflow.experiments.statistics import SuccessRate
from counterflow.policies import Normaliser
from counterflow.steering import ChunkCritic, CriticBinding, CriticConfig, GuidanceSettings, MethodSettings

TASK = "ogbench/cube-single-task1"


class Closed:
    def close(self) -> None: ...


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of what was run, which succeeds in half of its episodes."""
    labels: list[str] = []

    def run(
        env: Any, prior: Any, contender: Contender, learned: Any, critic: Any, episodes: range, seed: int, _: Any
    ) -> Evaluation:
        labels.append(contender.label)
        rate = SuccessRate(len(episodes) // 2, len(episodes))
        name = module.policy_name(prior)
        return Evaluation(TASK, contender.method, {}, name, seed, rate, 1.0, 1, 1, 0, 0.0, 0.0, 0.0)

    monkeypatch.setattr(module, "_run", run)
    monkeypatch.setattr(module, "open_env", lambda task, episodes, num_envs: Closed())
    return labels


def test_what_is_there_is_not_run_again(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    contenders = [Contender("base", "base"), Contender("FRS", "frs")]
    compare([TASK], contenders[:1], 4, 0, path=path)
    found = compare([TASK], contenders, 4, 0, path=path)
    assert runs == ["base", "FRS"]
    assert found.rates["base"][TASK] == SuccessRate(2, 4)
    compare([TASK], [Contender("FRS", "frs", MethodSettings(reversal_steps=3))], 4, 0, path=path)
    compare([TASK], contenders[:1], 4, 1, path=path)
    assert runs == ["base", "FRS", "FRS", "base"]


def test_a_result_from_before_a_setting_existed_had_its_default(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    compare([TASK], [Contender("FRS", "frs")], 4, 0, path=path)
    content = json.loads(path.read_text())
    del content["results"][0]["asked"]["method"]["padding"]
    path.write_text(json.dumps(content))
    compare([TASK], [Contender("FRS", "frs")], 4, 0, path=path)
    assert runs == ["FRS"]
    compare([TASK], [Contender("FRS", "frs", MethodSettings(padding="held"))], 4, 0, path=path)
    assert runs == ["FRS", "FRS"]


def test_a_critic_and_how_it_guides_are_part_of_what_was_asked(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    files = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        normaliser = Normaliser(torch.zeros(28), torch.ones(28))
        critic = ChunkCritic(CriticConfig(width=8, depth=1), CriticBinding("", "", 5, 5), normaliser)
        files.append(str(critic.save(tmp_path / f"critic-{seed}")))
    for file, how in (
        (files[0], GuidanceSettings(0.1)),
        (files[0], GuidanceSettings(0.1)),
        (files[1], GuidanceSettings(0.1)),
        (files[0], GuidanceSettings("auto")),
    ):
        compare([TASK], [Contender("FRS", "frs", critic=file, guidance=how)], 4, 0, path=path)
    assert len(runs) == 3
    compare([TASK], [Contender("FRS", "frs", guidance=GuidanceSettings(0.3))], 4, 0, path=path)
    compare([TASK], [Contender("FRS", "frs")], 4, 0, path=path)
    assert len(runs) == 4  # without a critic its settings say nothing
    content = json.loads(path.read_text())
    del content["results"][0]["asked"]["guidance"]["radius"]
    path.write_text(json.dumps(content))
    compare([TASK], [Contender("FRS", "frs", critic=files[0], guidance=GuidanceSettings(0.1))], 4, 0, path=path)
    assert len(runs) == 4


def test_more_episodes_are_the_missing_ones_alone(tmp_path: Path) -> None:
    contenders = [Contender("base", "base"), Contender("FRS", "frs")]
    path, whole = tmp_path / "begun.json", tmp_path / "whole.json"
    compare([TASK], contenders[:1], 1, 3, path=path)
    seen: list[int] = []
    compare([TASK], contenders, 3, 3, path=path, on_episode=lambda episode: seen.append(episode.seed))
    assert len(seen) == 2 + 3  # of the first contender, the two that were missing
    found = compare([TASK], contenders, 3, 3, path=path, on_episode=lambda episode: seen.append(episode.seed))
    assert len(seen) == 5
    at_once = compare([TASK], contenders, 3, 3, path=whole)
    for one, other in zip(found.results, at_once.results, strict=True):
        assert one.pop("diagnostics") == pytest.approx(
            other.pop("diagnostics"), abs=2e-6
        )  # rounded before they are pooled
        assert one | {"seconds": 0} == other | {"seconds": 0}
    assert len(json.loads(path.read_text())["results"]) == 2  # what was begun is part of what it became


def test_what_kept_no_episodes_is_run_from_the_first(runs: list[str], tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    compare([TASK], [Contender("base", "base")], 2, 0, path=path)
    found = compare([TASK], [Contender("base", "base")], 4, 0, path=path)
    assert found.rates["base"][TASK] == SuccessRate(2, 4)
    assert runs == ["base", "base"]
