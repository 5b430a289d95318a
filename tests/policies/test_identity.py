"""What counts as the same policy: numbers and code, wherever they hide; not where they lie."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from counterflow.errors import MismatchError
from counterflow.policies import ActionSpec, FieldPolicy, Normaliser
from counterflow.policies.identity import identify
from counterflow.steering import binding_of

SPEC = ActionSpec(3, 2)
SCALE = torch.tensor(2.0)


class Net(torch.nn.Module):
    def __init__(self, seed: int = 0, slope: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.linear = torch.nn.Linear(2, 2)
        self.slope = torch.nn.LeakyReLU(slope)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        return self.slope(self.linear(x))


def closing_over(net: Net) -> Callable[..., Tensor]:
    return lambda x, t, o: net(x, t, o)


def scaled(x: Tensor, t: Tensor, o: Tensor) -> Tensor:
    return SCALE * x


FIELDS: dict[str, Any] = {
    "a module": Net(),
    "other weights": Net(1),
    "another setting": Net(0, 0.2),
    "a closure": closing_over(Net()),
    "a closure with other weights": closing_over(Net(1)),
    "code": lambda x, t, o: -x,
    "other code": lambda x, t, o: x - t[:, None, None],
    "another constant": lambda x, t, o: 2 * x,
    "yet another": lambda x, t, o: 3 * x,
    "a default": lambda x, t, o, gain=1.0: gain * x,
    "another default": lambda x, t, o, gain=2.0: gain * x,
    "a partial": functools.partial(lambda gain, x, t, o: gain * x, 2.0),
    "another partial": functools.partial(lambda gain, x, t, o: gain * x, 3.0),
}


def test_policies_with_the_same_action_space_differ_where_their_fields_do() -> None:
    """They shared a binding once, so a noise policy for one could have driven a robot through the other."""
    found = {name: FieldPolicy(field, SPEC).fingerprint for name, field in FIELDS.items()}
    assert len(set(found.values())) == len(found)
    bindings = {binding_of(FieldPolicy(field, SPEC), 5) for field in FIELDS.values()}
    assert len(bindings) == len(FIELDS)
    first, second = (binding_of(FieldPolicy(Net(seed), SPEC), 5) for seed in (0, 1))
    with pytest.raises(MismatchError, match="another frozen policy"):
        first.check(second, "the noise policy")


def test_the_same_policy_made_twice_is_the_same() -> None:
    assert FieldPolicy(Net(), SPEC).fingerprint == FieldPolicy(Net(), SPEC).fingerprint
    assert FieldPolicy(closing_over(Net()), SPEC).fingerprint == FieldPolicy(closing_over(Net()), SPEC).fingerprint
    net = Net()
    assert FieldPolicy(net, SPEC).fingerprint == FieldPolicy(net.train(False), SPEC).fingerprint


def test_the_same_code_has_the_same_name_in_another_process() -> None:
    code = (
        "from counterflow.policies import ActionSpec, FieldPolicy\n"
        "print(FieldPolicy(lambda x, t, o: -x * 0.5, ActionSpec(3, 2)).fingerprint)"
    )
    runs = {subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout for _ in range(2)}
    assert len(runs) == 1
    assert len(runs.pop().strip()) == 16


def test_encoder_and_action_space_count() -> None:
    field = FIELDS["code"]
    unit = Normaliser(torch.zeros(2), torch.ones(2))
    policies = [
        FieldPolicy(field, SPEC),
        FieldPolicy(field, SPEC, encode=lambda o: o),
        FieldPolicy(field, SPEC, encode=lambda o: o + 1),
        FieldPolicy(field, ActionSpec(3, 2, padding=1)),
        FieldPolicy(field, ActionSpec(3, 2, past=1)),
        FieldPolicy(field, ActionSpec(3, 2, prior="uniform")),
        FieldPolicy(field, ActionSpec(3, 2, normaliser=unit)),
    ]
    assert len({policy.fingerprint for policy in policies}) == len(policies)


def test_a_name_stands_for_what_cannot_be_looked_into() -> None:
    first, second = (
        FieldPolicy(FIELDS["code"], SPEC, name="server 1"),
        FieldPolicy(FIELDS["a module"], SPEC, name="server 1"),
    )
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != FieldPolicy(FIELDS["code"], SPEC, name="server 2").fingerprint


def test_globals_that_a_function_names_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(scaled)
    assert identify(scaled) == before
    monkeypatch.setattr(sys.modules[scaled.__module__], "SCALE", torch.tensor(3.0))
    assert identify(scaled) != before


def test_arrays_numbers_and_containers() -> None:
    different = [
        1,
        1.0,
        "1",
        True,
        None,
        (1,),
        [1, 2],
        {"a": 1},
        {"a": 2},
        np.ones(2),
        np.ones(2, np.float32),
        torch.ones(2),
    ]
    assert len({identify(thing) for thing in different}) == len(different)
    assert identify({"a": 1, "b": 2}) == identify({"b": 2, "a": 1})
    circular: list[Any] = [1]
    circular.append(circular)
    assert identify(circular) == identify(circular)
