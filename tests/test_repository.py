"""What the documents show works, and what they point at exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith((".venv", ".cache", "node_modules")) for part in path.relative_to(ROOT).parts)
]


@pytest.mark.parametrize(
    "document",
    [
        ROOT / "README.md",
        *(
            ROOT / "docs" / f"{name}.md"
            for name in (
                "first-policy",
                "from-successes-to-a-policy",
                "offline-rl",
                "put-it-on-a-robot",
                "real-time-chunking",
            )
        ),
    ],
    ids=lambda path: path.name,
)
def test_python_in_the_documents_runs(document: Path, tmp_path: Path) -> None:
    """All blocks of a document, one after the other, as a reader would type them."""
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(), flags=re.DOTALL)
    assert blocks
    script = tmp_path / "typed.py"
    script.write_text("\n".join(blocks))
    subprocess.run([sys.executable, str(script)], check=True, cwd=tmp_path)


def test_commands_in_the_documents_are_understood() -> None:
    """Every `counterflow ...` line parses (nothing is run), and every command that stands beside an official one."""
    from counterflow.cli import parse

    beside = [
        command.split()[1:]
        for row in (ROOT / "docs" / "reproduce-the-papers.md").read_text().splitlines()
        for command in re.findall(r"`(counterflow [^`]+)`", row)
        if row.startswith("|")
    ]
    assert len(beside) > 20

    lines = [
        line.split("#")[0].split()[1:]
        for document in DOCUMENTS
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(), flags=re.DOTALL)
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("counterflow ")
    ]
    assert len(lines) > 5
    for arguments in [*lines, *beside]:
        parse(arguments)


def test_links_lead_somewhere() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {target}"
        for document in DOCUMENTS
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not missing


def test_simulator_processes_do_without_torch() -> None:
    """A worker that imports torch starts two seconds later and takes a few hundred megabytes more."""
    code = "import sys, counterflow.envs, counterflow.data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there() -> None:
    import counterflow

    for name in counterflow.__all__:
        assert getattr(counterflow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'steering_wheel'"):
        _ = counterflow.steering_wheel
