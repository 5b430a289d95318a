"""Steered policies and noises inside LeRobot: export a policy, convert recordings, add noises to a dataset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console


@dataclass(frozen=True)
class LeRobotExport:
    """Write a steered policy that lerobot-eval and lerobot-rollout take as --policy.path."""

    base: tyro.conf.Positional[str]
    """The frozen policy: a hub id or a folder of LeRobot's."""
    out: Path
    """The folder to write."""
    noise_policy: Path | None = None
    """What 'counterflow distill' wrote."""
    reasoner: str | None = None
    """Who gives hints, package.module:function; instead of a noise policy."""
    reversal_steps: int = 5
    """K of flow reversal steering, for a reasoner's hints."""
    padding: Literal["fresh", "held", "reversed"] = "fresh"
    """What becomes of padded dimensions in a reversal."""
    n_action_steps: int | None = None
    """Actions of a chunk that are executed before it decides again; default: as the base policy."""
    device: str = "cpu"
    """Where the policy will compute."""

    def run(self, console: Console) -> None:
        """Export, and say how to go on."""
        from counterflow.experiments.lerobot_data import export_policy

        settings = {"reversal_steps": self.reversal_steps, "padding": self.padding, "reasoner": self.reasoner}
        if self.n_action_steps is not None:
            settings["n_action_steps"] = self.n_action_steps
        with console.status(f"reading {self.base}"):
            export_policy(self.base, self.out, noise_policy=self.noise_policy, device=self.device, **settings)
        console.print(f"  {self.out}\nnext: lerobot-eval --policy.path={self.out} --env.type=...", soft_wrap=True)


@dataclass(frozen=True)
class LeRobotConvert:
    """Write a folder of 'counterflow record' as a LeRobotDataset (v3): a frame a step, with the noise of every step."""

    data: tyro.conf.Positional[Path]
    """The folder of a steering dataset, recorded with its steps."""
    out: Path
    """The new dataset's folder; it must not exist."""
    success_only: bool = False
    """Leave failed episodes out."""
    fps: int = 20
    """Steps a second, as LeRobot wants to know."""

    def run(self, console: Console) -> None:
        """Convert, with progress."""
        from counterflow.experiments.lerobot_data import convert_steering
        from counterflow.experiments.progress import progress_bar

        with progress_bar(console, f"converting {self.data.name}", 1, "episodes") as update:
            made = convert_steering(
                self.data,
                self.out,
                success_only=self.success_only,
                fps=self.fps,
                on_progress=lambda done, total: update(done, "", total),
            )
        console.print(f"{made.episodes} episodes, {made.frames:,} frames, {made.noises:,} with a noise:\n  {made.path}")


@dataclass(frozen=True)
class LeRobotAugment:
    """Add to a LeRobotDataset (v3) the noise of every chunk, and the frozen policy's features: offline DSBC for a VLA."""

    data: tyro.conf.Positional[str]
    """A dataset: a folder, or a hub id."""
    policy: str
    """The frozen policy: a hub id or folder of LeRobot's (with or without lerobot: before it)."""
    out: Path
    """The new dataset's folder; it must not exist."""
    steps: int | None = None
    """K, the denoising steps with which the noises will be used; default: the policy's own."""
    tolerance: float = 0.01
    """Largest reconstruction error, normalised units, of a chunk that may be learned from."""
    batch_size: int = 16
    """Frames at a time."""
    device: str = "cpu"
    """Where to compute."""

    def run(self, console: Console) -> None:
        """Augment, with progress."""
        from counterflow.experiments.lerobot_data import augment_dataset
        from counterflow.experiments.progress import progress_bar

        with progress_bar(console, f"inverting {self.data}", 1, "frames") as update:
            made = augment_dataset(
                self.data,
                self.policy,
                self.out,
                steps=self.steps,
                tolerance=self.tolerance,
                batch_size=self.batch_size,
                device=self.device,
                on_progress=lambda done, total: update(done, "", total),
            )
        console.print(
            f"{made.frames:,} frames, {made.noises:,} of them with a noise that may be learned from:\n  {made.path}\n"
            f"next: counterflow distill {made.path} --out noise-policy",
            soft_wrap=True,  # a command to copy stays in one line
        )


LeRobotCommand = (
    Annotated[LeRobotExport, tyro.conf.subcommand("export")]
    | Annotated[LeRobotConvert, tyro.conf.subcommand("convert")]
    | Annotated[LeRobotAugment, tyro.conf.subcommand("augment")]
)
