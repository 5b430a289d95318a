"""The command line as a user meets it: real commands, real files, real environments."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from counterflow.cli import main

TASK = "ogbench/cube-single-task4"
COMMANDS = (
    "collect",
    "demonstrate",
    "train",
    "eval",
    "record",
    "invert",
    "dataset",
    "distill",
    "dagger",
    "compare",
    "film",
    "analyse",
    "serve",
    "demo",
)
FIELDS = {"env", "steer", "episodes", "successes", "success_rate", "ci95", "seconds"}


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with a message and no traceback; return the message in one line."""
    capsys.readouterr()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    return " ".join(captured.err.split())


def evaluation(path: Path, *arguments: str) -> dict[str, object]:
    assert main(["eval", TASK, "--episodes", "4", "--seed", "3", "--json", str(path), *arguments]) == 0
    content: dict[str, object] = json.loads(path.read_text())
    return content


class TestHelp:
    @pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
    def test_every_command_explains_itself(self, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as ended:
            main([*command, "--help"])
        assert ended.value.code == 0
        assert "usage: counterflow" in capsys.readouterr().out

    def test_help_does_not_wait_for_torch(self) -> None:
        code = (
            "import sys\nfrom counterflow.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)

    def test_a_wrong_flag_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["eval", TASK, "--steeer", "frs"])
        assert "--steer" in capsys.readouterr().err


class TestEval:
    def test_steering_makes_the_shipped_prior_succeed(self, tmp_path: Path) -> None:
        base = evaluation(tmp_path / "base.json", "--steer", "base")
        steered = evaluation(tmp_path / "frs.json", "--steer", "frs")
        assert set(base) >= FIELDS
        assert base["successes"] <= 1  # type: ignore[operator]
        assert steered["successes"] >= 3  # type: ignore[operator]
        assert steered["ci95"][0] < steered["success_rate"] <= steered["ci95"][1]  # type: ignore[index, operator]

    def test_a_seed_repeats_exactly_whatever_the_number_of_environments(self, tmp_path: Path) -> None:
        first = evaluation(tmp_path / "a.json", "--steer", "partial", "--reasoner-error", "0.3")
        second = evaluation(tmp_path / "b.json", "--steer", "partial", "--reasoner-error", "0.3", "--num-envs", "1")
        assert first["outcomes"] == second["outcomes"]
        other = evaluation(tmp_path / "c.json", "--steer", "partial", "--seed", "4")
        assert other["outcomes"] != first["outcomes"]

    @pytest.mark.parametrize("method", ["direct", "rank"])
    def test_the_other_methods_run(self, method: str, tmp_path: Path) -> None:
        assert evaluation(tmp_path / "x.json", "--steer", method)["steer"] == method


class TestBadInput:
    def test_unknown_environment_suggests_the_nearest(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "'ogbench/cube-single-task4'" in failure(capsys, "eval", "ogbench/cube-singel-task4")

    def test_unknown_task_number(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "did you mean" in failure(capsys, "eval", "ogbench/scene-task9")

    def test_a_family_is_not_a_task(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "ogbench/scene-task3" in failure(capsys, "eval", "ogbench/scene")

    @pytest.mark.parametrize(
        ("flags", "word"),
        [
            (["--episodes", "0"], "episodes is 0"),
            (["--seed", "-1"], "seed is -1"),
            (["--reversal-steps", "0"], "(K) is 0"),
            (["--steer", "partial", "--tau", "1.5"], "tau is 1.5"),
            (["--steer", "rank", "--candidates", "0"], "n is 0"),
            (["--steps", "0", "--steer", "base"], "steps is 0"),
            (["--reasoner-error", "2"], "error is 2"),
            (["--reasoner-delay", "-1"], "delay is -1"),
            (["--magnitude", "nan"], "magnitude is nan"),
            (["--num-envs", "0"], "num_envs is 0"),
        ],
    )
    def test_numbers_out_of_range(self, flags: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert word in failure(capsys, "eval", TASK, "--episodes", "1", *flags)

    def test_a_device_that_is_not_there(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "Expected 'cpu'" in failure(capsys, "eval", TASK, "--episodes", "1", "--device", "gpu")
        train = ("train", "bc", str(tmp_path / "x.npz"), "--env", "ogbench/cube-single", "--device", "gpu")
        assert "Expected 'cpu'" in failure(capsys, *train)

    def test_a_policy_for_another_family(self, capsys: pytest.CaptureFixture[str]) -> None:
        message = failure(capsys, "eval", TASK, "--policy", "scene", "--episodes", "1")
        assert "sees 40 numbers" in message
        assert "shows 28" in message

    def test_no_shipped_prior(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "counterflow collect ogbench/cube-triple" in failure(capsys, "eval", "ogbench/cube-triple-task1")

    def test_a_missing_or_broken_checkpoint(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "cube-single" in failure(capsys, "eval", TASK, "--policy", "cube-sinlge")
        broken = tmp_path / "broken.safetensors"
        broken.write_bytes(b"not a checkpoint")
        assert "truncated" in failure(capsys, "eval", TASK, "--policy", str(broken))

    def test_a_result_that_cannot_be_written(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "file").write_text("")
        target = tmp_path / "file" / "x.json"
        message = failure(capsys, "eval", TASK, "--steer", "frs", "--episodes", "1", "--json", str(target))
        assert "can't write" in message

    def test_training_on_what_is_no_dataset(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        flags = ("--env", "ogbench/cube-single", "--out", str(tmp_path / "run"))
        assert "there is no dataset" in failure(capsys, "train", "bc", str(tmp_path / "none.npz"), *flags)
        (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 cut off")
        assert "truncated" in failure(capsys, "train", "bc", str(tmp_path / "bad.npz"), *flags)

    def test_resuming_what_is_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "can't be read" in failure(capsys, "train", "resume", str(tmp_path))

    def test_collecting_for_a_task_instead_of_a_family(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        message = failure(capsys, "collect", "ogbench/cube-single-task1", "--out", str(tmp_path / "x.npz"))
        assert "'ogbench/cube-single'" in message


class TestFromDataToEvaluation:
    def test_collect_train_resume_eval(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        data, run = tmp_path / "cube.npz", tmp_path / "run"
        assert main(["collect", "ogbench/cube-single", "--episodes", "2", "--out", str(data), "--workers", "1"]) == 0
        assert {"cube.npz", "cube-val.npz", "cube.json"} <= {path.name for path in tmp_path.iterdir()}
        train = ["train", "bc", str(data), "--env", "ogbench/cube-single", "--out", str(run), "--no-compile"]
        sizes = ["--network.width", "32", "--network.depth", "1", "--steps", "30", "--batch-size", "32"]
        assert main([*train, *sizes]) == 0
        assert "30 updates" in capsys.readouterr().out
        assert main(["train", "resume", str(run)]) == 0
        assert "nothing was left to do" in capsys.readouterr().out
        assert "other settings" in failure(capsys, *train, *sizes, "--learning-rate", "0.1")
        result = evaluation(tmp_path / "x.json", "--policy", str(run), "--steer", "base")
        assert result["policy"] == json.loads((run / "checkpoints" / "policy.json").read_text())["fingerprint"]


class TestCompare:
    def test_table_figure_and_results_that_are_not_run_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        path, figure = tmp_path / "results.json", tmp_path / "bars.png"
        arguments = ["compare", TASK, "ogbench/puzzle-3x3-task1", "--methods", "direct", "frs", "--episodes", "2"]
        arguments += ["--json", str(path), "--figure", str(figure)]
        assert main(arguments) == 0
        printed = capsys.readouterr().out
        assert "mean" in printed
        assert figure.read_bytes().startswith(b"\x89PNG")
        results = json.loads(path.read_text())["results"]
        assert [(one["env"], one["label"]) for one in results] == [
            (task, method) for task in (TASK, "ogbench/puzzle-3x3-task1") for method in ("direct", "frs")
        ]
        assert main(arguments) == 0
        assert json.loads(path.read_text())["results"] == results  # the times in it would differ, had it run again

    def test_a_file_of_something_else_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "other.json"
        path.write_text('{"precious": 1}')
        assert "does not hold the results" in failure(capsys, "compare", TASK, "--episodes", "1", "--json", str(path))
        assert path.read_text() == '{"precious": 1}'


class TestAnalyse:
    def test_both_quantities_fall_with_many_steps(self, tmp_path: Path) -> None:
        path, figure = tmp_path / "analysis.json", tmp_path / "analysis.png"
        flags = ["--references", "24", "--json", str(path), "--figure", str(figure)]
        assert main(["analyse", TASK, *flags]) == 0
        rows = {row["K"]: row for row in json.loads(path.read_text())["rows"]}
        assert rows[3]["displacement"] > rows[20]["displacement"] > rows[100]["displacement"]
        assert rows[5]["log_prob_gain"] > rows[50]["log_prob_gain"] > 0
        assert figure.read_bytes().startswith(b"\x89PNG")
