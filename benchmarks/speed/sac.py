"""How fast the SAC under DSRL learns, beside stable-baselines3's, whose fork the official torch code is, and torchrl's.

    pip install torchrl==0.14.1
    python benchmarks/speed/sac.py

Updates of networks of the sizes that the official code, its configuration for pi0 and our preset have, batches of 256, 20 updates
a call, at random transitions of cube-single's sizes: nothing is simulated and nothing is denoised. Ours have a layer norm more.
All by turns, the median of the rounds. Writes `sac.json` beside this file, and the table between its marks in the README.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from counterflow.data import Replay
from counterflow.experiments.evaluate import machine
from counterflow.files import write_between, write_json
from counterflow.learning.sac import ActionSizes, SACConfig, SACLearner

HERE = Path(__file__).parent
COMMAND = "benchmarks/speed/sac.py"
FEATURES, LATENT = 28, 25  # cube-single's observation; five actions of five numbers
BATCH, UPDATES, TRANSITIONS = 256, 20, 5_000
BOUND = 1.5  # of the latent
SEEDS = 3  # that ours learns side by side


@dataclass(frozen=True)
class Networks:
    """Sizes that are measured.

    Attributes:
        label: whose they are.
        depth: hidden layers.
        width: neurons of each.
        critics: how many.
    """

    label: str
    depth: int
    width: int
    critics: int


SIZES = (
    Networks("preset small", 2, 256, 4),
    Networks("official code, pi0", 3, 128, 10),
    Networks("official code, Robomimic", 3, 2048, 2),
)


@dataclass(frozen=True)
class Arguments:
    """Measure updates a second: ours, stable-baselines3's, torchrl's."""

    rounds: int = 3
    """Of each."""
    calls: int = 1
    """Of 20 updates in a round, at the large networks; ten times as many at the others."""


def ours(sizes: Networks, device: str, seeds: int) -> Callable[[], None]:
    """Return what makes 20 updates of ours, compiled."""
    config = SACConfig(
        batch_size=BATCH,
        update_ratio=UPDATES,
        width=sizes.width,
        depth=sizes.depth,
        members=sizes.critics,
        prefilled_share=0.0,
    )
    limits = torch.full((LATENT,), BOUND)
    learner: SACLearner[SACConfig] = SACLearner(
        ActionSizes(FEATURES, limits, LATENT), config, list(range(seeds)), device=device
    )
    replay = Replay((FEATURES, LATENT, LATENT), seeds, 1, TRANSITIONS, device=device)
    rng = torch.Generator().manual_seed(0)
    for _ in range(TRANSITIONS):
        shown, following = torch.randn((2, seeds, 1, FEATURES), generator=rng)
        actions = BOUND * (2 * torch.rand((seeds, 1, LATENT), generator=rng) - 1)
        rewards, none = torch.rand((seeds, 1), generator=rng), torch.zeros((seeds, 1), dtype=torch.bool)
        discounts = torch.full((seeds, 1), config.discount)
        replay.add(*(one.to(device) for one in (shown, actions, actions, rewards, discounts, following, none, none)))

    def update() -> None:
        learner.update(replay, UPDATES)

    return update


def theirs(sizes: Networks, device: str) -> Callable[[], None]:
    """Return what makes 20 updates of stable-baselines3's."""
    import gymnasium
    from stable_baselines3 import SAC
    from stable_baselines3.common.logger import Logger

    class Sizes(gymnasium.Env[Any, Any]):
        """An environment that has spaces and nothing else."""

        observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (FEATURES,), np.float32)
        action_space = gymnasium.spaces.Box(-BOUND, BOUND, (LATENT,), np.float32)

        def reset(self, **_: Any) -> tuple[Any, dict[str, Any]]:
            return np.zeros(FEATURES, np.float32), {}

    architecture = [sizes.width] * sizes.depth
    kwargs = {"net_arch": architecture, "activation_fn": torch.nn.Tanh, "n_critics": sizes.critics}
    model = SAC("MlpPolicy", Sizes(), buffer_size=TRANSITIONS, batch_size=BATCH, policy_kwargs=kwargs, device=device)
    model.set_logger(Logger(None, []))
    rng = np.random.default_rng(0)
    buffer: Any = model.replay_buffer
    for _ in range(TRANSITIONS):
        seen, following = rng.standard_normal((2, 1, FEATURES), np.float32)
        action = rng.uniform(-1, 1, (1, LATENT)).astype(np.float32)  # kept as a share of the bound
        buffer.add(seen, following, action, rng.random(1, np.float32), np.zeros(1, bool), [{}])

    def update() -> None:
        model.train(UPDATES, BATCH)

    return update


def torchrls(sizes: Networks, device: str) -> Callable[[], None]:
    """Return what makes 20 updates of torchrl's, as its own SAC script does, losses and gradients compiled."""
    from tensordict import TensorDict
    from tensordict.nn import NormalParamExtractor, TensorDictModule
    from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
    from torchrl.modules import MLP, ProbabilisticActor, TanhNormal, ValueOperator
    from torchrl.objectives import SACLoss, SoftUpdate

    shape: dict[str, Any] = {
        "num_cells": [sizes.width] * sizes.depth,
        "activation_class": torch.nn.Tanh,
        "device": device,
    }
    network = torch.nn.Sequential(MLP(FEATURES, 2 * LATENT, **shape), NormalParamExtractor())
    limits = torch.full((LATENT,), BOUND, device=device)
    actor = ProbabilisticActor(
        TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=TanhNormal,
        distribution_kwargs={"low": -limits, "high": limits},
        return_log_prob=False,
    )
    critic = ValueOperator(MLP(FEATURES + LATENT, 1, **shape), in_keys=["observation", "action"])
    loss = SACLoss(actor, critic, num_qvalue_nets=sizes.critics, target_entropy=-LATENT / 2, action_spec=None)
    loss.make_value_estimator(gamma=0.99)
    follow = SoftUpdate(loss, eps=0.995)
    optimiser = torch.optim.Adam([one for one in loss.parameters() if one.requires_grad], lr=3e-4, fused=True)
    rng = torch.Generator().manual_seed(0)
    shown, following = torch.randn((2, TRANSITIONS, FEATURES), generator=rng)
    none = torch.zeros((TRANSITIONS, 1), dtype=torch.bool)
    kept = {
        "observation": shown,
        "action": BOUND * (2 * torch.rand((TRANSITIONS, LATENT), generator=rng) - 1),
        "next": {
            "observation": following,
            "reward": torch.rand((TRANSITIONS, 1), generator=rng),
            "done": none,
            "terminated": none,
        },
    }
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(TRANSITIONS, device=device), batch_size=BATCH)
    buffer.extend(TensorDict(kept, [TRANSITIONS]).to(device))

    @torch.compile
    def losses(batch: Any) -> Any:
        found = loss(batch)
        return found["loss_actor"] + found["loss_qvalue"] + found["loss_alpha"]

    def update() -> None:
        for _ in range(UPDATES):
            optimiser.zero_grad()
            losses(buffer.sample()).backward()
            optimiser.step()
            follow.step()

    return update


def seconds_of(call: Callable[[], None], calls: int, device: str) -> float:
    """Return what one call takes."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(calls):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def measure(sizes: Networks, device: str, arguments: Arguments) -> dict[str, Any]:
    """Return updates a second of one seed: ours, ours with three seeds side by side, and the others'."""
    torch.compiler.reset()
    calls = arguments.calls * (1 if sizes.width > 1000 else 10)
    makers = {
        "ours": ours(sizes, device, 1),
        "ours, three seeds": ours(sizes, device, SEEDS),
        "stable-baselines3": theirs(sizes, device),
    }
    if find_spec("torchrl") is not None:
        makers["torchrl"] = torchrls(sizes, device)
    for call in makers.values():  # compiled, and warm
        seconds_of(call, 1, device)
    times: dict[str, list[float]] = {name: [] for name in makers}
    for _ in range(arguments.rounds):
        for name, call in makers.items():
            times[name].append(seconds_of(call, calls, device))
    rates = {name: UPDATES / statistics.median(found) for name, found in times.items()}
    rates["ours, three seeds"] *= SEEDS
    found = {name: round(rate, 2) for name, rate in rates.items()}
    networks = f"{sizes.depth} x {sizes.width}, {sizes.critics} critics"
    return {"sizes": sizes.label, "networks": networks, "device": device, "updates_per_second": found}


def table(found: list[dict[str, Any]]) -> str:
    """Write what was measured."""
    heads = ["ours", "ours, three seeds", "stable-baselines3", "torchrl"]
    lines = [
        "| sizes | networks | device | "
        + " | ".join(heads)
        + " | ours / stable-baselines3 | three seeds | ours / torchrl |",
        "| --- | --- | --- |" + " ---: |" * (len(heads) + 3),
    ]
    for one in found:
        rates = one["updates_per_second"]
        cells = [one["sizes"], one["networks"], one["device"]]
        cells += [f"{rates[name]:.3g}" if name in rates else "" for name in heads]
        cells += [f"{rates[name] / rates['stable-baselines3']:.2f}" for name in heads[:2]]
        cells.append(f"{rates['ours'] / rates['torchrl']:.2f}" if "torchrl" in rates else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    arguments, console = tyro.cli(Arguments), Console()
    if find_spec("torchrl") is None:
        console.print("torchrl isn't installed, and is left out: pip install torchrl==0.14.1 measures it, too.")
    found: list[dict[str, Any]] = []
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for sizes in SIZES:
            found.append(measure(sizes, device, arguments))
            console.print(found[-1])
            content = {"machine": {**machine(), "threads": torch.get_num_threads()}, "batch": BATCH, "measured": found}
            write_json(HERE / "sac.json", content)
    write_between(HERE / "README.md", "sac", COMMAND, table(found))


if __name__ == "__main__":
    main()
