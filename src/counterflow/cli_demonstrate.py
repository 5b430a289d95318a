"""Let the scripted expert demonstrate a task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console


@dataclass(frozen=True)
class Demonstrate:
    """Let the scripted experts solve a task, or many, and keep the successful episodes. Run again, it does what is left."""

    env: tyro.conf.Positional[str]
    """The task, for example ogbench/cube-single-task1; or a group or family, for example metaworld: then of each of its tasks."""
    episodes: int = 20
    """How many successful episodes (of every task)."""
    seed: int = 0
    """What every episode descends from."""
    out: Path | None = None
    """Where to write them (.npz, or, of several tasks, a folder); default: data/<task>-demonstrations."""
    noise: float = 0.1
    """Scale of the noise on the expert's plans; 0 for none."""
    num_envs: int | None = None
    """Environments stepped side by side (of several tasks: worker processes); the result does not depend on it."""
    overwrite: bool = False
    """Replace another file that lies there."""

    def run(self, console: Console) -> None:
        """Demonstrate, with progress."""
        from counterflow.envs import env_names, expand_tasks
        from counterflow.experiments.demonstrate import demonstrate
        from counterflow.experiments.progress import progress_bar

        tasks = expand_tasks([self.env])
        if self.env not in env_names():
            self._several(console, tasks)
            return
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

    def _several(self, console: Console, tasks: list[str]) -> None:
        """Demonstrate many tasks, with progress."""
        from counterflow.experiments.demonstrate import demonstrate_tasks
        from counterflow.experiments.progress import progress_bar

        out = self.out or Path("data") / f"{self.env.replace('/', '-')}-demonstrations"
        with progress_bar(console, f"demonstrating {self.env}", len(tasks), "tasks") as update:
            done = demonstrate_tasks(
                tasks,
                out,
                episodes=self.episodes,
                seed=self.seed,
                noise=self.noise,
                workers=self.num_envs,
                overwrite=self.overwrite,
                on_task=lambda task, count: update(count, task),
            )
        for task, reason in done.given_up.items():
            console.print(f"left out {task}: {reason}")
        transitions = sum(made.transitions for made in done.made.values())
        now = sum(made.made for made in done.made.values())
        console.print(
            f"{len(done.made)} of {len(tasks)} tasks, {transitions:,} transitions ({now} tasks made now):\n  {done.folder}"
        )
