"""A binding says what noises belong to, and refuses everything else in words that name what differs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from counterflow.binding import Binding
from counterflow.errors import MismatchError

BINDING = Binding("abc123", "ogbench/cube-single", 5, 4, 10, "euler")


def test_it_agrees_with_itself() -> None:
    BINDING.check(replace(BINDING), "the noise policy")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policy": "def456"}, "policy 'abc123', not 'def456'"),
        ({"family": "ogbench/scene"}, "family 'ogbench/cube-single', not 'ogbench/scene'"),
        ({"horizon": 6}, "horizon 5, not 6"),
        ({"dim": 3}, "dim 4, not 3"),
        ({"steps": 5}, "steps 10, not 5"),
        ({"solver": "rk4"}, "solver 'euler', not 'rk4'"),
    ],
)
def test_whatever_differs_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(MismatchError) as refused:
        BINDING.check(replace(BINDING, **change), "the noise policy x.safetensors")
    message = str(refused.value)
    assert message.startswith("the noise policy x.safetensors belongs to")
    assert message.split("denoising: ")[1].split(". The same")[0] == words
    assert "make it anew" in message


def test_all_differences_are_named_at_once() -> None:
    with pytest.raises(MismatchError, match=r"policy 'abc123', not 'x'; .*steps 10, not 3"):
        BINDING.check(replace(BINDING, policy="x", steps=3), "it")


def test_json_and_back() -> None:
    assert Binding.from_json(json.loads(json.dumps(BINDING.to_json()))) == BINDING


@pytest.mark.parametrize("content", [{}, {"policy": "x"}, {**asdict(BINDING), "colour": "blue"}, None, [1, 2]])
def test_something_else_is_not_read(content: Any) -> None:
    with pytest.raises((KeyError, TypeError)):
        Binding.from_json(content)
