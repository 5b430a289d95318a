"""What the scripts benchmarks/metaworld/run.py and benchmarks/libero/run.py share: options, the chain, the report."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from counterflow.errors import DatasetError
from counterflow.experiments.generalist_report import Differs, report_means, write_report
from counterflow.experiments.generalist_suite import STAGES, Stage, Suite, SuiteSettings, run_suite
from counterflow.files import write_between


@dataclass(frozen=True)
class Arguments:
    """Options of the scripts."""

    stages: tuple[Stage, ...] = STAGES
    """Which to run; each does what is missing."""
    only_report: bool = False
    """Write tables and figures from the results that are there."""
    out: Path = Path()
    """The folder of README.md, results/, data/ and runs/."""
    settings: Annotated[SuiteSettings, tyro.conf.arg(name="")] = field(default_factory=SuiteSettings)
    """What the chain does."""


def script(folder: Path, settings: SuiteSettings, description: str, differs: Differs) -> None:
    """Parse the command line, run what is missing, and write the report.

    Args:
        folder: the script's own, where everything goes unless another is named.
        settings: the defaults.
        description: of the script, for --help.
        differs: from the paper, for the side-by-side table.
    """
    arguments = tyro.cli(Arguments, default=Arguments(out=folder, settings=settings), description=description)
    console = Console(log_path=False)
    suite = Suite(arguments.settings, arguments.out, lambda line: console.log(line, highlight=False))
    try:
        if not arguments.only_report:
            run_suite(suite, arguments.stages)
    finally:  # days may have passed before a stage that can't be run
        _report(suite, arguments.out, folder, differs, console)


def _report(suite: Suite, out: Path, folder: Path, differs: Differs, console: Console) -> None:
    """Print the tables, and write them into the page beside the results unless they are of some tasks alone."""
    command = f"benchmarks/{folder.name}/run.py"
    whole = not suite.settings.tasks
    tables = write_report(suite, out / "README.md" if whole else None, command, differs)
    if whole and out.resolve() == folder.resolve():  # what is measured elsewhere is not the project's front page
        with suppress(DatasetError):  # an earlier stage is not finished
            write_between(folder.parents[1] / "README.md", suite.settings.family, command, report_means(suite))
    for name, table in tables.items():
        console.print(f"\n{name}\n{table}", markup=False, highlight=False, soft_wrap=True)
