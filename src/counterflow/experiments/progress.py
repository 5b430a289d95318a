"""Progress on the terminal: what is being done, how far it is, how fast it goes, how long it will take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class RateColumn(ProgressColumn):
    """How many a second."""

    def render(self, task: Task) -> Text:
        """Show the rate, once it is known."""
        speed = task.finished_speed or task.speed
        unit = task.fields.get("unit", "")
        return Text("" if speed is None else f"{speed:,.1f} {unit}/s", style="progress.data.speed")


@contextmanager
def progress_bar(console: Console, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    """Show a bar while the block runs.

    Args:
        console: where to draw; when it is not a terminal nothing moves.
        description: what is being done.
        total: how many there are to do.
        unit: of what, in the plural.

    Yields:
        A function to call as `update(done, note)`, or `update(done, note, total)` where the total was only a guess.
    """
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, unit=unit, note="")

        def update(done: int, note: str = "", total: int | None = None) -> None:
            progress.update(task, completed=done, note=note, total=total)

        yield update
