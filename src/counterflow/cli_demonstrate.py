"""Let the scripted expert demonstrate a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console


@dataclass(frozen=True)
class Demonstrate:
    """Let OGBench's oracles solve a task, and keep the successful episodes. Run again, it does nothing."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task1."""
    episodes: int = 20
    """How many successful episodes."""
    seed: int = 0
    """What every episode descends from."""
    out: Path | None = None
    """Where to write them (.npz); default: data/<task>-demonstrations.npz."""
    noise: float = 0.1
    """Scale of the noise on the expert's plans; 0 for none."""
    num_envs: int | None = None
    """Environments stepped side by side; the result does not depend on it."""
    overwrite: bool = False
    """Replace another file that lies there."""

    def run(self, console: Console) -> None:
        """Demonstrate, with progress."""
        from counterflow.experiments.demonstrate import demonstrate
        from counterflow.experiments.progress import progress_bar

        out = self.out or Path("data") / f"{self.env.split('/')[-1]}-demonstrations.npz"
        with progress_bar(console, f"demonstrating {self.env}", self.episodes, "episodes") as update:
            made = demonstrate(
                self.env,
                out,
                episodes=self.episodes,
                seed=self.seed,
                noise=self.noise,
                num_envs=self.num_envs,
                overwrite=self.overwrite,
                on_episode=lambda successes, attempts: update(successes, f"{successes}/{attempts} succeeded"),
            )
        if not made.made:
            console.print("these demonstrations were made before; nothing was left to do.")
        console.print(
            f"{made.episodes} demonstrations ({made.attempts} attempts), {made.transitions:,} transitions:\n"
            f"  {made.path}\n  {made.provenance_path}"
        )
