"""What the pages on LeRobot show works: their Python is run, with a small policy in the place of yours."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from counterflow.policies.lerobot import load_lerobot

from .test_plugin import noise_policy

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["steer-smolvla.md", "noise-policy-for-your-vla.md"])
def test_python_in_the_documents_runs(name: str, shared: Callable[..., Any], tmp_path: Path) -> None:
    base = shared("smolvla").save(tmp_path / "base")
    noise_policy(load_lerobot(base), tmp_path / "noise-policy")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(), flags=re.DOTALL)
    assert blocks
    text = "\n".join(blocks).replace("you/your-smolvla", str(base)).replace("torch.zeros(1, 6)", "torch.zeros(1, 5)")
    script = tmp_path / "typed.py"
    script.write_text(text)
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)
