"""One distillation in a process of its own: its time, and its memory above the bare interpreter's."""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path


def peak_megabytes() -> float:
    """Return the most memory that this process has held so far (Linux; `ru_maxrss` would count the parent's, too)."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


def main(folder: Path, first: int) -> None:
    """Distil the first successes in a folder and print what it took."""
    interpreter = peak_megabytes()
    began = time.perf_counter()
    from counterflow.experiments.distill import distill  # what is imported counts, too

    imported = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        regressor = distill([folder], Path(scratch) / "noise-policy", first=first)
    print(
        json.dumps(
            {
                "examples": regressor.provenance["examples"],
                "updates": regressor.provenance["updates"],
                "seconds_to_import": round(imported - began, 1),
                "seconds_to_train": round(time.perf_counter() - imported, 1),
                "interpreter_megabytes": round(interpreter),
                "megabytes_above_interpreter": round(peak_megabytes() - interpreter),
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
