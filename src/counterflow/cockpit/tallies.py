"""How often each way of driving succeeded, with intervals; kept in the run's folder."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from counterflow.errors import DatasetError
from counterflow.experiments.statistics import SuccessRate
from counterflow.files import write_json

MIXED = "mixed"


@dataclass(frozen=True)
class Outcome:
    """What came of one episode.

    Attributes:
        env: the task.
        seed: what it descends from.
        index: its number in this run.
        method: how it was driven; "mixed" where that was switched, "dsbc+help" for a noise policy that was helped.
        success: whether the task was solved; an episode that is given up is none.
        steps: executed actions.
        decisions: chunks.
    """

    env: str
    seed: int
    index: int
    method: str
    success: bool
    steps: int
    decisions: int


class Tallies:
    """The outcomes of a run, on disk after every episode.

    Args:
        path: the file; what is there is gone on with.

    Raises:
        DatasetError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.outcomes: list[Outcome] = []
        if path.exists():
            try:
                self.outcomes = [Outcome(**one) for one in json.loads(path.read_text())["outcomes"]]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DatasetError(
                    f"{path} can't be read: {error}. Move it away to count anew, or choose another folder."
                ) from error

    def add(self, outcome: Outcome) -> None:
        """Count an episode.

        Raises:
            StorageError: the file can't be written; it is counted for as long as this process runs.
        """
        self.outcomes.append(outcome)
        write_json(self._path, {"outcomes": [asdict(one) for one in self.outcomes]})

    @property
    def next_index(self) -> int:
        """The number of the next episode: no two of a run begin alike."""
        return max((one.index for one in self.outcomes), default=-1) + 1

    def of(self, env: str) -> list[dict[str, Any]]:
        """Return, for every way of driving this task, how often it succeeded and the 95% interval."""
        methods = dict.fromkeys(one.method for one in self.outcomes if one.env == env)
        found = []
        for method in methods:
            rate = SuccessRate.of(one.success for one in self.outcomes if (one.env, one.method) == (env, method))
            low, high = rate.interval
            found.append(
                {"method": method, "successes": rate.successes, "episodes": rate.episodes, "interval": [low, high]}
            )
        return found
