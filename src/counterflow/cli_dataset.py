"""Look at steering datasets (folders of recorded steered rollouts), merge them, keep a part, mend a damaged one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from counterflow.data.steering import SteeringDataset, copy_filtered, merge, repair
from counterflow.files import write_json


@dataclass(frozen=True)
class DatasetSummary:
    """Show what a steering dataset holds: episodes and successes for each task and recording, and its noises."""

    path: tyro.conf.Positional[Path]
    """The dataset's folder."""
    json: Path | None = None
    """Where to write the numbers, and how every recording was made."""

    def run(self, console: Console) -> None:
        """Read and check every episode, and print tables."""
        dataset = SteeringDataset.load(self.path)
        _show(console, dataset)
        if self.json is not None:
            write_json(self.json, dataset.summary())
            console.print(f"  {self.json}")


@dataclass(frozen=True)
class DatasetMerge:
    """Write the episodes of several steering datasets to a new one, each once. Run it again after an interruption.

    They must belong to the same policy, environments and denoising.
    """

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """The datasets' folders."""
    out: Path
    """The new folder; the datasets themselves stay as they are."""

    def run(self, console: Console) -> None:
        """Merge, and print what there is now."""
        _show(console, merge(self.paths, self.out))
        console.print(f"  {self.out}")


@dataclass(frozen=True)
class DatasetFilter:
    """Write a part of a steering dataset to a new one. Run it again after an interruption."""

    path: tyro.conf.Positional[Path]
    """The dataset's folder."""
    out: Path
    """The new folder; the dataset itself stays as it is."""
    success_only: bool = False
    """Keep successful episodes alone."""
    env: str | None = None
    """Keep episodes of this task alone, for example ogbench/cube-single-task1."""
    first: int | None = None
    """Of what is left, keep the first so many episodes of every task."""

    def run(self, console: Console) -> None:
        """Filter, and print what there is now."""
        success = True if self.success_only else None
        _show(console, copy_filtered(self.path, self.out, success, self.env, self.first))
        console.print(f"  {self.out}")


@dataclass(frozen=True)
class DatasetRepair:
    """Set damaged episodes aside (into DIR/damaged), so that the rest can be used and the missing be recorded again."""

    path: tyro.conf.Positional[Path]
    """The dataset's folder."""

    def run(self, console: Console) -> None:
        """Repair, and say what was set aside."""
        aside = repair(self.path)
        for file in aside:
            console.print(f"  {file}", soft_wrap=True)
        left = len(SteeringDataset.load(self.path))
        if aside:
            console.print(
                f"{len(aside)} damaged set aside, {left} good ones left. Record again to make what is missing."
            )
        else:
            console.print(f"all {left} episodes are good; nothing was to be done.")


DatasetCommand = (
    Annotated[DatasetSummary, tyro.conf.subcommand("summary")]
    | Annotated[DatasetMerge, tyro.conf.subcommand("merge")]
    | Annotated[DatasetFilter, tyro.conf.subcommand("filter")]
    | Annotated[DatasetRepair, tyro.conf.subcommand("repair")]
)


def _show(console: Console, dataset: SteeringDataset) -> None:
    found = dataset.summary()
    table = Table(title=f"Steering dataset {dataset.path}", title_justify="left", header_style="bold")
    table.add_column("")
    for name in ("episodes", "successes", "decisions", "steps"):
        table.add_column(name, justify="right")
    for env, counts in found["environments"].items():
        _add_row(table, env, counts)
    if found["sources"]:
        table.add_section()
    for source, counts in found["sources"].items():
        _add_row(table, f"recording {source}", counts)
    table.add_section()
    _add_row(table, "all", found)
    console.print(table)

    binding = found["binding"]
    facts = Table(show_header=False, box=None)
    facts.add_row("policy", f"{binding['policy']} for {binding['family']}")
    facts.add_row(
        "chunks",
        f"{binding['horizon']} actions of {binding['dim']} numbers, {binding['steps']} {binding['solver']} steps",
    )
    if len(dataset):
        expected = math.sqrt(binding["horizon"] * binding["dim"])
        facts.add_row("interventions", f"{found['interventions']:.1%} of the decisions")
        facts.add_row("noise", f"norm {found['noise_norm']:.2f} (Gaussian about {expected:.2f})")
        for size, share in found["noise_beyond"].items():
            gaussian = math.erfc(float(size) / math.sqrt(2))  # P(|x| > size), x ~ N(0, 1)
            facts.add_row("", f"{share:.1%} of its numbers beyond {size} (Gaussian {gaussian:.1%})")
    console.print(facts)


def _add_row(table: Table, name: str, counts: dict[str, Any]) -> None:
    table.add_row(name, *(f"{counts[column]:,}" for column in ("episodes", "successes", "decisions", "steps")))
