"""How fast the prior trains, how much stepping environments side by side gains, and how fast online reinforcement learning is.

    python benchmarks/speed/run.py DATA
    python benchmarks/speed/run.py --stages online

DATA is a cube-single dataset, made by `counterflow collect ogbench/cube-single`; only the stage "training" reads it. Writes
`results.json` beside this file, and the tables between their marks in its README.
"""

from __future__ import annotations

import json
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console

from counterflow.envs import VectorEnv, describe, make_env
from counterflow.experiments.evaluate import ReasonerSettings, evaluate, load_prior, machine
from counterflow.experiments.online import OnlineProgress, train_online
from counterflow.experiments.online_agents import decoding
from counterflow.experiments.online_settings import OnlineRun, online_preset
from counterflow.experiments.train import train_bc
from counterflow.files import write_between, write_json
from counterflow.learning import BCConfig
from counterflow.learning.bc import choose_precision
from counterflow.learning.dsrl import DSRLConfig
from counterflow.learning.sac import SACLearner
from counterflow.steering import SteeringSpace

HERE = Path(__file__).parent
COMMAND = "benchmarks/speed/run.py"
ENV = "ogbench/cube-single-task4"
Stage = Literal["training", "evaluation", "online"]


@dataclass(frozen=True)
class Arguments:
    """Run the speed benchmark."""

    data: tyro.conf.Positional[Path | None] = None
    """A cube-single dataset (.npz), for the stage "training"."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """training: of the prior; evaluation: with environments side by side; online: reinforcement learning on the frozen flow."""
    steps: int = 12_000
    """Updates of the training."""
    repeats: int = 3
    """Repeats of each evaluation; the median is reported."""
    turns: int | None = None
    """Of the stage "online", decisions of every environment that are measured; default: each setting's own."""
    smoke: bool = False
    """Of the stage "online", see only whether it runs: tiny networks, one turn, nothing compiled, nothing written."""


def measure_training(data: Path, steps: int, precision: Literal["bfloat16", "float32"]) -> dict[str, Any]:
    """Train a 4 x 512 prior with batch 512 and say how long it took, compilation included."""
    folder = Path(tempfile.mkdtemp())
    try:
        trained = train_bc(data, "ogbench/cube-single", folder / "run", BCConfig(steps=steps, precision=precision))
    finally:
        shutil.rmtree(folder)
    return {
        "precision": precision,
        "updates": steps,
        "seconds": round(trained.seconds, 1),
        "updates_per_second": round(steps / trained.seconds, 1),
        "held_out_loss": round(trained.validation_loss, 5),
    }


def measure_evaluation(num_envs: int, workers: int, episodes: int, repeats: int) -> dict[str, Any]:
    """Evaluate Flow Reversal Steering and the base policy; return environment steps a second of wall-clock."""
    prior = load_prior(ENV)
    rates: dict[str, list[float]] = {"base": [], "frs": []}
    with make_env(ENV, num_envs, workers=workers) as env:
        for _ in range(repeats):
            for method, values in rates.items():
                result = evaluate(env, prior, method, episodes, seed=0, reasoner=ReasonerSettings())
                values.append(result.environment_steps / result.seconds)
    return {
        "environments": num_envs,
        "worker_processes": workers,
        "episodes": episodes,
        "steps_per_second": {method: round(statistics.median(values)) for method, values in rates.items()},
    }


@dataclass(frozen=True)
class Online:
    """A setting of online learning whose speed is measured.

    Attributes:
        label: in the table.
        variant: of DSRL.
        preset: whose settings.
        turns: decisions of every environment that are measured, by device.
    """

    label: str
    variant: Literal["sac", "aliasing"]
    preset: Literal["small", "paper"]
    turns: dict[str, int]


# The official torch code is the noise-aliasing variant's: 3 x 2048, 2 critics, 20 updates of 256 a decision, ten steps of the
# noise critic in each, 4 environments. The SAC variant on pi0 has 10 critics of 3 x 128. Both at their released settings, and
# ours for two cores.
ONLINE = (
    Online("noise aliasing, released settings", "aliasing", "paper", {"cpu": 1, "cuda": 40}),
    Online("SAC variant, released settings", "sac", "paper", {"cpu": 20, "cuda": 40}),
    Online("noise aliasing, preset small", "aliasing", "small", {"cpu": 20, "cuda": 40}),
    Online("SAC variant, preset small", "sac", "small", {"cpu": 40, "cuda": 40}),
)
BEFORE = (
    8  # decisions of each environment before learning begins, in the place of the settings' own: only speed is measured
)


class Clock:
    """Seconds spent in functions, by what they are for; calls inside each other count for the outer one.

    Args:
        device: waited for at both ends of a call.
    """

    def __init__(self, device: str) -> None:
        self._device, self._inside = device, False
        self.seconds: dict[str, float] = {}

    def now(self) -> float:
        """Return the time, once the device has done what it was told."""
        if self._device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its seconds counted."""

        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self._inside:
                return function(*arguments, **options)
            began, self._inside = self.now(), True
            try:
                return function(*arguments, **options)
            finally:
                self._inside = False
                self.seconds[kind] = self.seconds.get(kind, 0.0) + self.now() - began

        return wrapped


@contextmanager
def watched(clock: Clock) -> Iterator[None]:
    """Count the seconds of simulators, of the frozen flow while acting, and of updates."""
    places: tuple[tuple[str, Any, str], ...] = (
        ("environment", VectorEnv, "execute"),
        ("environment", VectorEnv, "reset"),
        ("flow", SteeringSpace, "encode"),
        ("flow", SteeringSpace, "decide"),
        ("updates", SACLearner, "update"),
    )
    before = [getattr(owner, name) for _, owner, name in places]
    for (kind, owner, name), function in zip(places, before, strict=True):
        setattr(owner, name, clock.timed(kind, function))
    try:
        yield
    finally:
        for (_, owner, name), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def measure_online(one: Online, device: str, turns: int | None, *, smoke: bool) -> dict[str, Any]:
    """Learn online for a few turns; say how fast, and where the time goes.

    The first turn that learns, which compiles, is left out. The flow inside the updates (noise aliasing decodes random latents
    there) counts as updates; `flow_in_updates` is what it takes by itself.
    """
    config, settings = online_preset("dsrl", one.preset, one.variant)
    assert isinstance(config, DSRLConfig)
    measured = 1 if smoke else turns or one.turns[device]
    config = replace(config, warmup=BEFORE * settings.num_envs)
    if smoke:
        config = replace(config, width=16, compile=False)
    settings = replace(
        settings,
        decisions=(BEFORE + measured) * settings.num_envs,
        report_every=settings.num_envs,
        checkpoint_every=10**9,
        evaluate_every=0,
        episodes=0,
        start_episodes=0,
    )
    clock, marks = Clock(device), []
    torch.compiler.reset()  # or the next setting's losses are versions too many of the one before, and run uncompiled

    def mark(progress: OnlineProgress) -> None:
        ledger = progress.ledger
        if ledger.updates:
            marks.append((clock.now(), dict(clock.seconds), ledger.updates, ledger.environment_steps))

    folder = Path(tempfile.mkdtemp())
    try:
        with watched(clock):
            train_online("dsrl", ENV, folder / "run", config, settings, device=device, on_progress=mark)
    finally:
        shutil.rmtree(folder)
    (began, before, first, some), (ended, after, last, all_steps) = marks[0], marks[-1]
    seconds, updates = ended - began, last - first
    parts = {kind: after[kind] - before.get(kind, 0.0) for kind in ("environment", "flow", "updates")}
    if one.variant == "aliasing":
        parts["flow_in_updates"] = updates * seconds_of_decoding(config, settings, device, smoke=smoke)
    return {
        "setting": one.label,
        "device": device,
        "networks": f"{config.depth} x {config.width}, {config.members} critics",
        "batch": config.batch_size,
        "updates_a_decision": config.update_ratio,
        "environments": settings.num_envs,
        "updates": int(updates),
        "environment_steps": int(all_steps - some),
        "updates_per_second": round(updates / parts["updates"], 3),
        "environment_steps_per_second": round((all_steps - some) / seconds, 3),
        "seconds": {**{kind: round(value, 3) for kind, value in parts.items()}, "all": round(seconds, 3)},
    }


def seconds_of_decoding(config: DSRLConfig, settings: OnlineRun, device: str, *, smoke: bool) -> float:
    """Return what the flow takes in an update of noise aliasing: next latents and random ones, compiled as they are there."""
    space = settings.space("dsrl", load_prior(ENV, None, device))
    decode, rest = decoding(space)
    decode = torch.no_grad()(decode if smoke else torch.compile(decode))
    clock, times = Clock(device), []
    shown = space.encode(torch.zeros(1, describe(ENV).observation_dim))[1]
    for _ in range(3 if smoke else 8):
        began = clock.now()
        for rows in (config.batch_size, config.batch_size * config.distill_steps):
            arguments = (shown.expand(rows, -1), torch.zeros(rows, space.size), torch.zeros(rows, rest))
            decode(*(one.to(device) for one in arguments))
        times.append(clock.now() - began)
    return statistics.median(times[2:])


def online_table(found: list[dict[str, Any]]) -> str:
    """Write what was measured as a table: speeds, and the shares of the time."""
    lines = [
        "| setting | networks | device | updates a second | environment steps a second | environment | flow | updates | rest |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in found:
        seconds = one["seconds"]
        share = {name: 100 * seconds[name] / seconds["all"] for name in ("environment", "flow", "updates")}
        inside = (
            f" (flow {100 * seconds['flow_in_updates'] / seconds['all']:.0f}%)" if "flow_in_updates" in seconds else ""
        )
        lines.append(
            f"| {one['setting']} | {one['networks']} | {one['device']} | {one['updates_per_second']:.3g} | "
            f"{one['environment_steps_per_second']:.3g} | {share['environment']:.0f}% | {share['flow']:.0f}% | "
            f"{share['updates']:.0f}%{inside} | {100 - sum(share.values()):.0f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    arguments = tyro.cli(Arguments)
    console = Console()
    if arguments.smoke:
        console.print(online_table([measure_online(one, "cpu", 1, smoke=True) for one in ONLINE]), soft_wrap=True)
        return
    path = HERE / "results.json"
    result: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if "training" in arguments.stages:
        result["training"] = training(arguments, console)
    if "evaluation" in arguments.stages:
        result["evaluation"] = evaluation(arguments)
    if {"training", "evaluation"} & {*arguments.stages}:
        result["machine"] = {**machine(), "processor": _processor(), "threads": torch.get_num_threads()}
    if "online" in arguments.stages:
        devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
        threads = torch.get_num_threads()  # all cores' for the big networks; the simulators wait meanwhile
        found: list[dict[str, Any]] = []
        for device in devices:
            for one in ONLINE:
                found.append(measure_online(one, device, arguments.turns, smoke=False))
                console.print(found[-1])
                result["online"] = {
                    "machine": {**machine(), "processor": _processor(), "threads": threads},
                    "task": ENV,
                    "measured": found,
                }
                write_json(path, result)  # the released settings take minutes: nothing is lost when it is stopped
        write_between(HERE / "README.md", "online", COMMAND, online_table(found))
    write_json(path, result)
    console.print(json.dumps(result, indent=1))


def training(arguments: Arguments, console: Console) -> list[dict[str, Any]]:
    """Measure the training of the prior."""
    if arguments.data is None:
        raise SystemExit(
            "the stage 'training' needs DATA, a cube-single dataset: counterflow collect ogbench/cube-single"
        )
    # Where the processor has no instructions for bfloat16 it is emulated, and nobody would choose it.
    precisions = sorted(
        {choose_precision("auto", torch.device("cpu")), choose_precision("float32", torch.device("cpu"))}
    )
    found = [measure_training(arguments.data, arguments.steps, precision) for precision in precisions]
    console.print(found)
    return found


def evaluation(arguments: Arguments) -> dict[str, Any]:
    """Measure evaluation with one environment and with many."""
    torch.set_num_threads(1)  # as the command line does: the policy is small, and the cores are the simulators'
    # One environment in the caller's process, as a simple loop would have it, against the default.
    single = measure_evaluation(1, 0, 16, arguments.repeats)
    vectorised = measure_evaluation(16, 2, 32, arguments.repeats)
    gain = {
        method: round(vectorised["steps_per_second"][method] / single["steps_per_second"][method], 2)
        for method in single["steps_per_second"]
    }
    return {"single": single, "vectorised": vectorised, "gain": gain}


def _processor() -> str:
    """Return the processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
