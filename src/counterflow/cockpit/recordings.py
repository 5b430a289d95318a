"""The episodes of a run that were kept, as `counterflow record` and `counterflow dagger` keep them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np

from counterflow.cockpit.episode import Episode
from counterflow.cockpit.targets import METHODS, Target, binding_for
from counterflow.cockpit.training import CORRECTIONS, RECORDINGS
from counterflow.data import SteeringDataset, SteeringEpisode
from counterflow.errors import CounterflowError
from counterflow.experiments.record import arrays_of


class Recordings:
    """A run's two datasets: what somebody steered, and what a noise policy drove and somebody may have helped with.

    Args:
        out: the run's folder.
        seed: what every episode descends from.
        target: what drives; it knows the noises, or finds them.

    Attributes:
        counts: by dataset, how many "episodes", "successes" and "decisions" there are of the task that was counted last.
    """

    def __init__(self, out: Path, seed: int, target: Target) -> None:
        self._out, self._seed, self._target = out, seed, target
        self._writing = threading.Lock()  # a dataset lets one write at a time, of the same process, too
        self.counts: dict[str, Any] = {}

    def check(self) -> None:
        """Raise `MismatchError` where nobody knows the noises of what is driven."""
        binding_for(self._target, "this episode can't be kept")

    def add(self, episode: Episode) -> None:
        """Put an episode into its dataset.

        Raises:
            CounterflowError: it can't be written.
        """
        binding = binding_for(self._target, "this episode can't be kept")
        helped = "dsbc" in episode.methods
        arrays = arrays_of(episode.decisions, bases=helped)
        self._target.complete(arrays, np.array(episode.reusable), steps=episode.success or helped)
        if "step_noise" in arrays:
            arrays["step_intervened"] = np.repeat(arrays["intervened"], arrays["executed"])
        arrays["method"] = np.array([METHODS.index(method) for method in episode.methods], np.int64)
        place = self._out / (CORRECTIONS if helped else RECORDINGS)
        provenance = {
            "recording": "cockpit",
            "env": episode.env,
            "methods": list(METHODS),
            "every_step": "regularised",
            "seed": self._seed,
            "policy": binding.policy,
        }
        with self._writing, SteeringDataset.create_or_open(place, binding) as dataset:
            source = dataset.add_source(provenance)
            dataset.append(SteeringEpisode(episode.env, episode.seed, episode.index, episode.success, source, arrays))

    def count(self, env: str) -> None:
        """Count what there is of a task."""
        counts: dict[str, Any] = {}
        for name in (RECORDINGS, CORRECTIONS):
            try:
                own = [episode for episode in SteeringDataset.load(self._out / name) if episode.env == env]
            except CounterflowError:
                own = []
            counts[name] = {
                "episodes": len(own),
                "successes": sum(episode.success for episode in own),
                "decisions": sum(episode.decisions for episode in own),
            }
        self.counts = counts
