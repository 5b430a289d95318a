"""Calls in worker processes: every item once, in workers that are replaced, and what happens when one dies."""

from __future__ import annotations

import os

import pytest

from counterflow.errors import InvalidInputError, WorkerError
from counterflow.experiments.workers import in_workers


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A worker imports this module by its name, which pytest alone knows unless the path says where it is."""
    monkeypatch.syspath_prepend(request.config.rootpath)


def square(number: int) -> tuple[int, int, str]:
    return number**2, os.getpid(), os.environ["OMP_NUM_THREADS"]


def die_at_two(number: int) -> int:
    if number == 2:
        os._exit(1)
    return number


def refuse(number: int) -> int:
    raise InvalidInputError(f"{number} is refused")


def test_every_item_comes_back_once_from_workers_that_are_replaced() -> None:
    found = dict(in_workers(square, range(5), workers=1, each=2))  # with max_tasks_per_child this waited for ever
    assert {item: result[0] for item, result in found.items()} == {item: item**2 for item in range(5)}
    assert len({process for _, process, _ in found.values()}) == 3
    assert {threads for _, _, threads in found.values()} == {os.environ.get("OMP_NUM_THREADS", "1")}


def test_nothing_to_do() -> None:
    assert list(in_workers(square, [])) == []


def test_a_worker_that_dies_is_told_of() -> None:
    with pytest.raises(WorkerError, match="died at 2.*run the same again"):
        list(in_workers(die_at_two, range(4), workers=1, each=4))


def test_what_the_function_raises_is_raised() -> None:
    with pytest.raises(InvalidInputError, match="is refused"):
        list(in_workers(refuse, [1], workers=1))
    with pytest.raises(InvalidInputError, match="workers"):
        list(in_workers(square, [1], workers=0))
