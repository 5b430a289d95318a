"""The chain of stages: which tasks each takes, what is kept for whom, the tables, and a small chain from experts to a table."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from counterflow.envs.libero import STEP_LIMITS, LiberoEnv, assets_folder
from counterflow.envs.types import Moment
from counterflow.errors import (
    CounterflowError,
    DatasetError,
    InvalidInputError,
    MismatchError,
    MissingDependencyError,
    UnknownNameError,
)
from counterflow.experiments import generalist_script
from counterflow.experiments.generalist import TRAINING
from counterflow.experiments.generalist_report import Differs, report_means, write_report
from counterflow.experiments.generalist_suite import (
    SEEDS,
    STAGES,
    Suite,
    SuiteSettings,
    partial,
    rank,
    reversal,
    run_suite,
    slug,
    steering,
    timing,
)
from counterflow.experiments.generalist_suite.making import try_expert
from counterflow.files import write_json
from counterflow.policies import GeneralistConfig

TRAIN = tuple(f"metaworld/{name}-v3" for name in ("drawer-open", "push", "reach", "window-open"))
HELD = tuple(f"metaworld/{name}-v3" for name in ("door-close", "window-close", "push-back", "lever-pull"))
SETTINGS = SuiteSettings(
    tasks=(*TRAIN, *HELD),
    episodes=20,
    hard=1,
    guided=2,
    reversals=(5, 10),
    taus=(0.5,),
    candidates=(4,),
)
LABELS = {"frs": reversal(10).label, "partial": partial(0.5).label, "rank": rank(4).label}
DIFFERS = Differs("a small one", "a state", "a script")


def steer_of(label: str) -> str:
    """Return the method of a label."""
    return label if label in ("base", "bc", "dsbc", "direct", "guided") else "frs"


def measured(suite: Suite, stage: str, successes: dict[str, dict[str, int]], policy: str = "ours") -> None:
    """Write what a stage would have measured: task -> label -> successes of 20."""
    for task, labels in successes.items():
        results: list[dict[str, Any]] = [
            {"label": label, "env": task, "steer": steer_of(label), "episodes": 20, "seed": SEEDS[stage], "policy": policy,
             "asked": {"method": {}, "reasoner": suite.asked_by(steer_of(label)).to_json()}, "successes": count}
            for label, count in labels.items()
        ]  # fmt: skip
        write_json(suite.results / stage / f"{slug(task)}.json", {"results": results})


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """A suite whose generalist was measured on eight tasks."""
    made = Suite(SETTINGS, tmp_path, lambda _: None)
    write_json(made.results / "generalist.json", {"policy": "ours", "given": "elsewhere"})
    counts = dict(zip((*TRAIN, *HELD), (12, 3, 20, 9, 2, 0, 8, 9), strict=True))
    measured(made, "base", {task: {"base": count} for task, count in counts.items()})
    return made


@pytest.fixture
def steered(suite: Suite) -> Suite:
    """And steered: FRS works at two of the three tasks in the table."""
    rows = {
        "door-close": (1, 2, 3, 3, 14, 0),
        "window-close": (0, 0, 1, 2, 1, 0),
        "push-back": (4, 3, 5, 4, 6, 0),
    }
    labels = ("base", "direct", LABELS["partial"], LABELS["rank"], LABELS["frs"], reversal(5).label)
    measured(
        suite,
        "zero_shot",
        {f"metaworld/{name}-v3": dict(zip(labels, counts, strict=True)) for name, counts in rows.items()},
    )
    return suite


def test_the_split_is_the_committed_one(suite: Suite) -> None:
    assert (tuple(suite.training), tuple(suite.tasks)) == (TRAIN, (*TRAIN, *HELD[:3], HELD[3]))
    assert [suite.kind_of(task) for task in (TRAIN[0], HELD[0], HELD[2], HELD[3])] == [
        "train", "held-out-goals", "held-out-pairs", "held-out-scenes",
    ]  # fmt: skip


def test_tasks_are_chosen_by_the_base(suite: Suite) -> None:
    assert suite.steered() == [HELD[1], HELD[0], HELD[2]]  # 40% or less, the lowest first; lever-pull has 45%
    assert suite.failed() == [HELD[1], HELD[0]]
    # The most even first, by turns: 9 and 9, 12 and 8 of 20, of both splits. Always and never say nothing.
    assert suite.critics_tasks() == ([HELD[3], TRAIN[0]], [TRAIN[3], HELD[2]])


def test_no_table_is_made_of_the_episodes_that_chose_its_tasks() -> None:
    assert SEEDS["zero_shot"] != SEEDS["base"]
    assert SEEDS["distillation"] not in (SEEDS["base"], SEEDS["zero_shot"])
    assert SEEDS["guidance"] != SEEDS["base"]


def test_another_policys_results_are_not_taken(suite: Suite) -> None:
    measured(suite, "base", {TRAIN[2]: {"base": 1}}, policy="another")
    with pytest.raises(DatasetError, match=r"not measured on 1 tasks .*reach-v3.*'base'"):
        suite.steered()


def test_results_of_other_references_are_not_taken(steered: Suite) -> None:
    other = Suite(replace(SETTINGS, gripper="hold"), steered.folder)
    assert (other.reasoner.gripper, other.reasoner.to_json()["gripper"]) == ("hold", "hold")
    assert "gripper" not in steered.reasoner.to_json()  # recordings made before it was known go on
    assert steered.rates("zero_shot")
    assert list(other.rates("zero_shot")) == ["base"]  # which asks nobody
    assert other.base_rates() == steered.base_rates()
    with pytest.raises(DatasetError, match="'zero_shot'"):
        other.chosen(HELD[0])
    assert other.data != steered.data


def test_results_of_other_episodes_are_not_taken(suite: Suite) -> None:
    """Whatever stands last in the file."""
    for changed in (replace(SETTINGS, seed=7), replace(SETTINGS, episodes=5)):
        assert Suite(changed, suite.folder).rates("base") == {}
    assert suite.rates("base")


def test_a_policy_that_cannot_be_loaded_is_not_taken_for_the_one_trained_here(suite: Suite) -> None:
    before = suite.read("generalist")
    wrong = Suite(replace(SETTINGS, policy=str(suite.folder / "nothing-here")), suite.folder)
    with pytest.raises(CounterflowError, match="nothing-here"):
        run_suite(wrong, ["generalist"])
    assert suite.read("generalist") == before


def test_what_is_known_of_the_policy_that_was_trained_here_stays(suite: Suite) -> None:
    write_json(suite.results / "generalist.json", {"policy": "ours", "parameters": 7})
    shipped = Suite(replace(SETTINGS, policy="shipped"), suite.folder)
    shipped.__dict__["fingerprint"] = "ours"
    run_suite(shipped, ["generalist"])
    assert suite.read("generalist") == {"policy": "ours", "parameters": 7}
    shipped.__dict__["fingerprint"] = "another"
    run_suite(shipped, ["generalist"])
    assert suite.read("generalist") == {"policy": "another", "given": "shipped"}


def test_a_critic_of_other_tasks_is_another_one(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the table needs to know of it is written again where that was lost."""

    class Critic:
        provenance: ClassVar = {"episodes": 9, "successes": 3}

    trained: list[list[str]] = []

    def train(folders: list[Path], out: Path, *_: Any, **__: Any) -> Critic:
        trained.append([folder.name for folder in folders])
        out.parent.mkdir(parents=True, exist_ok=True)
        out.touch()
        return Critic()

    monkeypatch.setattr(steering, "record", lambda *_, **__: None)
    monkeypatch.setattr(steering, "train_critic", train)
    monkeypatch.setattr(steering, "load", lambda _: object())
    monkeypatch.setattr(steering.ChunkCritic, "load", lambda _: Critic())
    monkeypatch.setattr(Suite, "evaluate", lambda *_: None)
    run_suite(suite, ["guidance"])
    (suite.results / "critic.json").unlink()
    run_suite(suite, ["guidance"])
    assert len(trained) == 1
    assert suite.read("critic") == {"policy": "ours", **Critic.provenance}
    measured(suite, "base", {HELD[2]: {"base": 10}})  # which is more even now than those that came first
    run_suite(suite, ["guidance"])
    assert len(trained) == 2
    assert trained[0] != trained[1]


def test_a_policy_that_looks_is_not_guided(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(steering, "load", lambda _: object())
    monkeypatch.setattr(steering, "looks", lambda _: True)
    run_suite(Suite(SETTINGS, suite.folder, said.append), ["guidance"])
    assert "through cameras" in said[0]


def test_where_steering_works_decides_on_what_is_learned(steered: Suite) -> None:
    assert steered.working() == [HELD[0], HELD[2]]  # the greatest gain first; exactly ten points count
    assert steered.hardest() == [HELD[1]]
    measured(steered, "zero_shot", {HELD[0]: {"base": 1}})
    with pytest.raises(DatasetError, match="door-close-v3 was not steered"):
        steered.working()


def test_a_tasks_settings_are_the_best_on_the_others(steered: Suite) -> None:
    """K = 10 is the best of all three, by what it does on door-close alone: for that task it may not count."""
    counts = {HELD[1]: (1, 2), HELD[0]: (14, 0), HELD[2]: (6, 7)}
    for task, (ten, five) in counts.items():
        others = dict.fromkeys(("base", "direct", LABELS["partial"], LABELS["rank"]), 3)
        measured(steered, "zero_shot", {task: {**others, reversal(10).label: ten, reversal(5).label: five}})
    assert [steered.chosen(task)["frs"] for task in steered.steered()] == [10, 5, 10]
    assert steered.contenders(HELD[0])["frs"].label == reversal(5).label
    table = steered.steered_rates()
    assert [table["frs"][task].successes for task in steered.steered()] == [1, 0, 6]
    assert table["base"][HELD[2]].successes == 3


def test_noises_may_have_other_steps_than_steering(steered: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded and what learns online agree on them, and recordings of others are not gone on with."""
    asked: list[tuple[str, int | None, int]] = []

    def keep(task: str, method: str, out: Path, **given: Any) -> None:
        asked.append((out.name, given["noise_steps"], given["settings"].reversal_steps))

    monkeypatch.setattr(steering, "record", keep)
    shorter = Suite(replace(steered.settings, noise_steps=3), steered.folder, lambda _: None)
    for suite in (steered, shorter):
        steering.steered_successes(suite, HELD[0], 5)
    (whole, none, reversals), (short, three, same) = asked
    assert whole != short
    assert (none, three, same) == (None, 3, reversals)
    assert steered.asked_of_learning(HELD[0], "works")["steps"] == steered.noise_steps(HELD[0]) == reversals
    assert shorter.asked_of_learning(HELD[0], "works")["steps"] == shorter.noise_steps(HELD[0]) == 3


def test_settings_are_not_chosen_of_half_a_table(suite: Suite) -> None:
    with pytest.raises(DatasetError, match="'zero_shot'"):
        suite.contenders(HELD[0])


def test_tables(steered: Suite) -> None:
    counts = {"base": 1, LABELS["frs"]: 15, "bc": 5, "dsbc": 14}
    measured(steered, "distillation", {HELD[0]: counts, HELD[2]: counts})
    for label, rate in (("DSRL", 0.25), ("DSRL + FRS", 0.75), ("residual", 0.5)):
        curves = {"0": [{"decisions": 30, "success_rate": rate, "episodes": 20}]}
        asked = steered.asked_of_learning(HELD[0], "works")
        assert (asked["policy"], asked["steps"], asked["decisions"]) == ("ours", 10, SETTINGS.decisions)
        content = {"asked": asked, "kind": "works", "task": HELD[0], "label": label, "curves": curves}
        write_json(steered.results / "rl" / f"{label}.json", content)
        if label == "DSRL":  # the other task's only one so far
            content |= {"asked": steered.asked_of_learning(HELD[2], "works"), "task": HELD[2]}
            write_json(steered.results / "rl" / "other.json", content)
            wrong = {"asked": steered.asked_of_learning(HELD[1], "hard"), "kind": "works", "task": HELD[1]}
            write_json(steered.results / "rl" / "wrong.json", content | wrong)
    document = steered.folder / "README.md"
    document.write_text("before\n<!-- zero_shot: written by x.py -->\nold\n<!-- /zero_shot -->\nafter\n")
    tables = write_report(steered, document, "x.py", DIFFERS)
    assert document.read_text() == (
        f"before\n<!-- zero_shot: written by x.py -->\n{tables['zero_shot']}\n<!-- /zero_shot -->\nafter\n"
    )
    zero_shot = tables["zero_shot"].splitlines()
    assert zero_shot[2].startswith("| window-close-v3 | held-out-goals | 0 (0-16) |")
    assert "| tasks of the 2 that the base fails that gain 10 points or more | | 0 | 0 | 1 | 2 | 1 |" in zero_shot
    assert "| tasks of all 3 that gain 10 points or more | | 0 | 0 | 1 | 2 | 2 |" in zero_shot
    assert "| **mean of 2** | **5 (" in tables["distillation"]
    assert "DSBC minus BC: +45.0" in tables["distillation"]
    assert "| where FRS works | door-close-v3 | 50 (30-70) | 25 (11-47) | 75 (53-89) |" in tables["rl"]
    assert "| where FRS works | push-back-v3 |  | 25 (11-47) |  |" in tables["rl"]
    assert "**mean of 1 that have all** | **50 (30-70)** | **25 (11-47)** | **75 (53-89)** |" in tables["rl"]
    assert "window-close" not in tables["rl"]
    assert "| FRS, mean | 13.2 | 35 (" in tables["paper"]
    assert "| FRS, tasks failed by the base that gain 10 points or more | 11 of 42 | 1 of 2 |" in tables["paper"]
    assert "| train | 4 | 55 (" in tables["generalist"]
    assert (steered.folder / "zero-shot.png").exists()
    means = report_means(steered).splitlines()
    assert means[2].startswith("| the 2 that it fails | ")
    assert means[3].startswith("| all 3 that are steered | ")
    assert means[3].split(" | ")[-1].startswith("35 (")


def test_a_trial_of_some_tasks_is_not_written_into_the_page(
    steered: Suite, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document, page = (
        steered.folder / "README.md",
        "<!-- zero_shot: written by benchmarks/x/run.py -->\nall\n<!-- /zero_shot -->\n",
    )
    document.write_text(page)
    folder = steered.folder.parent / "x"
    given = ["run.py", "--out", str(steered.folder), "--stages", "zero_shot", "--tasks", *TRAIN, *HELD]
    monkeypatch.setattr("sys.argv", given)
    monkeypatch.setattr(generalist_script, "run_suite", lambda *_: (_ for _ in ()).throw(DatasetError("no more")))
    with pytest.raises(DatasetError, match="no more"):
        generalist_script.script(folder, replace(SETTINGS, tasks=()), "", DIFFERS)
    assert document.read_text() == page
    assert "| window-close-v3 | held-out-goals |" in capsys.readouterr().out  # what there is is told, whatever failed
    monkeypatch.setattr(generalist_script, "run_suite", lambda *_: None)
    monkeypatch.setattr("sys.argv", given[: given.index("--tasks")])
    generalist_script.script(folder, replace(SETTINGS, tasks=()), "", DIFFERS)
    assert document.read_text() != page


def test_a_simulators_speed_beside_robosuites_own_is_told(tmp_path: Path) -> None:
    suite = Suite(SETTINGS, tmp_path)
    row = {"environments": 1, "steps_per_second": 150.0, "seconds_per_chunk": {"simulator": 0.05}}
    found = {"task": "libero/90/x", "horizon": 8, "machine": {"cores": 2}, "rows": [row]}
    write_json(tmp_path / "results" / "speed.json", found)
    assert "robosuite" not in write_report(suite, tmp_path / "README.md", "x.py", DIFFERS)["speed"]
    both = {"counterflow": 0.005, "robosuite": 0.01}
    write_json(tmp_path / "results" / "speed.json", {**found, "beside_robosuite": {"step": both, "reset": both}})
    assert "| a step | 5.0 | 10.0 |" in write_report(suite, tmp_path / "README.md", "x.py", DIFFERS)["speed"]


def test_a_task_that_is_still_being_measured_is_left_out(steered: Suite) -> None:
    measured(steered, "distillation", {HELD[0]: {"base": 1, "bc": 5, "dsbc": 14}})  # FRS comes last
    tables = write_report(steered, steered.folder / "README.md", "x.py", DIFFERS)
    assert tables["distillation"] == "Not measured yet."
    assert "distilled" not in tables["paper"]
    write_json(steered.results / "critic.json", {"policy": "another", "episodes": 9, "successes": 3})
    write_json(steered.results / "guidance-tasks.json", {"policy": "ours", "seen": [HELD[0]], "unseen": []})
    measured(steered, "guidance", {HELD[0]: {"base": 1, "guided": 2}})
    assert write_report(steered, steered.folder / "README.md", "x.py", DIFFERS)["guidance"] == "Not measured yet."
    write_json(steered.results / "critic.json", {"policy": "ours", "episodes": 9, "successes": 3})
    guided = write_report(steered, steered.folder / "README.md", "x.py", DIFFERS)["guidance"]
    assert "| has seen it | guided minus base, points | | +5.0" in guided


def test_what_was_not_run_is_said(tmp_path: Path) -> None:
    tables = write_report(Suite(SETTINGS, tmp_path), tmp_path / "README.md", "x.py", DIFFERS)
    assert {*tables.values()} == {"Not measured yet."}
    assert not (tmp_path / "README.md").exists()


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="libero"):
        SuiteSettings(family="liberoo")
    for wrong, said in (
        ({"rollouts": 0}, "rollouts is 0"),
        ({"convention": "papre"}, "convention is 'papre'"),
        ({"reasoner_error": 7}, "reasoner_error is 7"),
        ({"reversals": ()}, "reversals is empty"),
        ({"noise_steps": 0}, "steps"),
        ({"family": "libero", "expert_episodes": 60}, "at most 50"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(InvalidInputError, match=said):
            SuiteSettings(**wrong)
    with pytest.raises(UnknownNameError, match="did you mean"):
        run_suite(Suite(SETTINGS, tmp_path), ["zero_shto"])  # type: ignore[list-item]
    with pytest.raises(MismatchError, match="expected some of both"):
        run_suite(Suite(replace(SETTINGS, tasks=TRAIN), tmp_path))


@pytest.fixture
def libero_task() -> str:
    try:
        assets_folder()
        pytest.importorskip("robosuite", reason="LIBERO is not installed: counterflow[libero]")
    except MissingDependencyError as error:
        pytest.skip(str(error))
    return "libero/90/KITCHEN_SCENE1_put_the_black_bowl_on_the_plate"


def test_liberos_experts_begin_in_its_numbered_initial_states(
    libero_task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, reset_to = [], LiberoEnv.reset_to

    def told(self: LiberoEnv, start: int, seed: int = 0) -> Moment:
        began.append(start)
        return reset_to(self, start, seed)

    monkeypatch.setattr(LiberoEnv, "reset_to", told)
    monkeypatch.setitem(STEP_LIMITS, "90", 3)
    found = try_expert(libero_task, 2, 0.1, 0)
    assert (began, found["steps"], found["successes"]) == ([0, 1], [3, 3], [False, False])


def test_libero_is_measured_beside_robosuite(libero_task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BESIDE_STEPS", 3)
    monkeypatch.setattr(timing, "BESIDE_RESETS", 1)
    found = timing.beside_robosuite(libero_task, 0)
    both = {"counterflow", "robosuite"}
    assert {what: {*one} for what, one in found.items()} == {"step": both, "reset": both}
    assert all(seconds > 0 for one in found.values() for seconds in one.values())


def test_a_chain_from_experts_to_a_table_goes_on_where_it_stopped(tmp_path: Path) -> None:
    pytest.importorskip("metaworld", reason="Meta-World is not installed: counterflow[metaworld]")
    settings = SuiteSettings(
        tasks=("metaworld/drawer-close-v3", "metaworld/handle-press-v3", "metaworld/door-close-v3"),
        episodes=1,
        expert_episodes=1,
        demonstrations=2,
        architecture=GeneralistConfig(width=16, encoder_depth=1, depth=1, heads=2, max_objects=4),
        learning=replace(TRAINING, horizon=50, steps=4, batch_size=16, compile=False),
        regime=1.0,
        reversals=(3,),
        taus=(0.5,),
        candidates=(2,),
        workers=1,
    )
    stages = STAGES[: STAGES.index("zero_shot") + 1]
    said: list[str] = []
    run_suite(Suite(settings, tmp_path, said.append), stages)
    suite = Suite(settings, tmp_path, said.append)
    tables = write_report(suite, tmp_path / "README.md", "x.py", DIFFERS)
    assert "3 of 3 tasks solved" in tables["experts"]
    assert "| door-close-v3 | held-out-goals |" in tables["zero_shot"]
    assert "4 updates of 16 chunks (the last 4 took" in tables["generalist"]
    assert set(suite.rates("zero_shot")) == {one.label for grid in suite.grids.values() for one in grid.values()}

    said.clear()
    run_suite(suite, stages)
    assert [line.split(":")[1].split(" in ")[0] for line in said] == [" done"] * len(stages)  # nothing was left to do
