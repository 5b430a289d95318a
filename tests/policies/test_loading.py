"""One door to all policies; what of LeRobot's can be refused without LeRobot is refused without it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import counterflow
from counterflow.errors import CheckpointError, InvalidInputError, MismatchError, MissingDependencyError
from counterflow.policies import FlowPolicy
from counterflow.policies.lerobot import check_config
from counterflow.policies.lerobot_flows import FLOWS, NOT_FLOWS

WITHOUT = pytest.mark.skipif(importlib.util.find_spec("lerobot") is not None, reason="LeRobot is here")


def test_our_own_come_through_it() -> None:
    assert isinstance(counterflow.load("cube-single"), FlowPolicy)


@WITHOUT
def test_without_lerobot_it_says_how_to_get_it() -> None:
    with pytest.raises(MissingDependencyError, match=r"Python 3\.12 and an environment of its own: pip install"):
        counterflow.load("lerobot:lerobot/smolvla_base")


def test_no_name() -> None:
    with pytest.raises(InvalidInputError, match="names no policy"):
        counterflow.load("lerobot:")


def test_a_folder_of_lerobots_without_the_word(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=f"say lerobot:{tmp_path}"):
        counterflow.load(tmp_path)


@pytest.mark.parametrize("kind", sorted(NOT_FLOWS))
def test_every_refusal_has_a_reason(kind: str) -> None:
    assert kind not in FLOWS
    with pytest.raises(MismatchError, match="can't be steered") as refused:
        check_config({"type": kind}, "it")
    assert NOT_FLOWS[kind] in str(refused.value)


def test_unknown_types_and_modes() -> None:
    with pytest.raises(MismatchError, match="doesn't know"):
        check_config({"type": "crystal_ball"}, "it")
    with pytest.raises(CheckpointError, match="unknown mode 'LOG'"):
        check_config({"type": "pi05", "normalization_mapping": {"ACTION": "LOG"}}, "it")
    check_config({"type": "pi05", "normalization_mapping": {"ACTION": "QUANTILES"}}, "it")
