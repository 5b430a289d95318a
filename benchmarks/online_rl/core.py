"""Our SAC and PPO against stable-baselines3's on tasks that everybody knows, with the same budget and settings.

    python benchmarks/online_rl/core.py

SAC on Pendulum-v1 and PPO on InvertedPendulum-v5, three seeds each; ours side by side as a batch, theirs one after another. What
is compared is the return of the mean action in twenty episodes at the end. Results go to `results/core.json` and a table of the
README; what is there is not trained again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np
import numpy.typing as npt
import torch
import tyro
from rich.console import Console
from torch import Tensor

from counterflow.data.replay import Replay
from counterflow.experiments.evaluate import machine
from counterflow.files import write_between, write_json
from counterflow.learning.rfs import RFSConfig, RFSLearner, Rollout
from counterflow.learning.sac import ActionSizes, SACConfig, SACLearner
from counterflow.random import child_seed

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "core.json", HERE / "README.md"
SEEDS = (0, 1, 2)
EPISODES = 20
SAC_ENV, PPO_ENV = "Pendulum-v1", "InvertedPendulum-v5"
Actions = npt.NDArray[np.float32]
Act = Callable[[Actions], Actions]


@dataclass(frozen=True)
class Arguments:
    """Compare the cores."""

    algorithms: tuple[Literal["sac", "ppo"], ...] = ("sac", "ppo")
    """Which."""
    sac_steps: int = 5_000
    """Environment steps of each seed."""
    ppo_steps: int = 102_400
    """Environment steps of each seed."""
    only_report: bool = False
    """Write the table from the results that are there."""


class Streams:
    """Environments of one seed, each begun anew when it ends."""

    def __init__(self, name: str, seed: int, count: int) -> None:
        self.envs: list[Any] = [gymnasium.make(name) for _ in range(count)]
        self.seen = np.stack(
            [env.reset(seed=child_seed(seed, "stream", row))[0] for row, env in enumerate(self.envs)]
        ).astype(np.float32)

    def step(self, actions: Actions) -> tuple[Actions, Actions, npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return what is seen next (of an episode that ended, at its end), rewards, terminations, and ends of any kind."""
        following, rewards, ended, over = [], [], [], []
        for row, env in enumerate(self.envs):
            low, high = env.action_space.low, env.action_space.high
            seen, reward, terminated, truncated, _ = env.step(np.clip(actions[row], low, high))
            following.append(seen)
            rewards.append(reward)
            ended.append(terminated)
            over.append(terminated or truncated)
            self.seen[row] = env.reset()[0] if terminated or truncated else seen
        return np.stack(following).astype(np.float32), np.array(rewards, np.float32), np.array(ended), np.array(over)


def returns_of(name: str, act: Act) -> list[float]:
    """Return the returns of episodes that are the same for everybody."""
    env, found = gymnasium.make(name), []
    for episode in range(EPISODES):
        seen, _ = env.reset(seed=10_000 + episode)
        total, over = 0.0, False
        while not over:
            action = act(np.asarray(seen, np.float32)[None])[0]
            space: Any = env.action_space
            seen, reward, terminated, truncated, _ = env.step(np.clip(action, space.low, space.high))
            total, over = total + float(reward), terminated or truncated
        found.append(total)
    return found


def our_sac(steps: int) -> list[list[float]]:
    """Train ours with stable-baselines3's settings; return each seed's returns."""
    space: Any = gymnasium.make(SAC_ENV).action_space
    config = SACConfig(
        batch_size=256,
        update_ratio=1,
        warmup=100,
        learning_rate=1e-3,
        actor_learning_rate=1e-3,
        temperature_learning_rate=1e-3,
        width=256,
        depth=2,
        activation="relu",
        layer_norm=False,
        prefilled_share=0.0,
        target_entropy=-1.0,
    )
    limits = torch.from_numpy(space.high)
    learner: SACLearner[SACConfig] = SACLearner(ActionSizes(3, limits, 1), config, SEEDS)
    replay = Replay((3, 1, 1), len(SEEDS), 1, steps + 1)
    streams = [Streams(SAC_ENV, seed, 1) for seed in SEEDS]
    rng = torch.Generator().manual_seed(0)
    for step in range(steps):
        shown = torch.from_numpy(np.stack([one.seen for one in streams]))
        anything = (2 * torch.rand((len(SEEDS), 1, 1), generator=rng) - 1) * limits
        actions = anything if step < config.warmup else learner.act(shown)
        made = [one.step(action.numpy()) for one, action in zip(streams, actions, strict=True)]
        following, rewards, ended, over = (torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True))
        discounts = config.discount * (~ended).float()
        replay.add(shown, actions, actions, rewards, discounts, following, over, torch.zeros_like(over))
        if step >= config.warmup:
            learner.update(replay, 1)

    def acting(index: int) -> Act:
        def act(seen: Actions) -> Actions:
            shown = torch.from_numpy(seen).expand(len(SEEDS), -1, -1)
            actions: Actions = learner.act(shown, explore=False)[index].numpy()
            return actions

        return act

    return [returns_of(SAC_ENV, acting(index)) for index in range(len(SEEDS))]


def our_ppo(steps: int) -> list[list[float]]:
    """Train RFS's PPO with stable-baselines3's settings: a Gaussian "latent" is the action."""
    streams = [Streams(PPO_ENV, seed, 8) for seed in SEEDS]
    config = RFSConfig(
        width=64, depth=2, activation="tanh", rollout=128, minibatches=4, value_learning_rate=3e-4, value_weight=0.5
    )
    learner = RFSLearner(4, 1, torch.zeros(0), config, SEEDS)
    for _ in range(steps // (8 * config.rollout)):
        turns: list[tuple[Tensor, ...]] = []
        for _ in range(config.rollout):
            shown = torch.from_numpy(np.stack([one.seen for one in streams]))
            raw, densities = learner.act(shown)
            made = [one.step(action.numpy()) for one, action in zip(streams, raw, strict=True)]
            following, rewards, ended, over = (torch.from_numpy(np.stack(column)) for column in zip(*made, strict=True))
            turns.append((shown, raw, densities, rewards, config.discount * (~ended).float(), following, over))
        learner.update(Rollout(*(torch.stack(column) for column in zip(*turns, strict=True))))

    def acting(index: int) -> Act:
        def act(seen: Actions) -> Actions:
            with torch.no_grad():
                actions: Actions = learner.mean(torch.from_numpy(seen).expand(len(SEEDS), -1, -1))[index].numpy()
            return actions

        return act

    return [returns_of(PPO_ENV, acting(index)) for index in range(len(SEEDS))]


def their_action(model: Any, seen: Actions) -> Actions:
    """Return the mean action of a model of stable-baselines3's."""
    action: Actions = model.predict(seen, deterministic=True)[0]
    return action


def their_sac(steps: int) -> list[list[float]]:
    """Train stable-baselines3's SAC, a seed after another."""
    from stable_baselines3 import SAC

    found = []
    for seed in SEEDS:
        model = SAC("MlpPolicy", SAC_ENV, learning_rate=1e-3, learning_starts=100, seed=seed, device="cpu")
        model.learn(steps)
        found.append(returns_of(SAC_ENV, partial(their_action, model)))
    return found


def their_ppo(steps: int) -> list[list[float]]:
    """Train stable-baselines3's PPO, a seed after another."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    found = []
    for seed in SEEDS:
        envs = make_vec_env(PPO_ENV, 8, seed=seed)
        settings: dict[str, Any] = {"n_steps": 128, "batch_size": 256, "n_epochs": 10, "max_grad_norm": 1.0}
        model = PPO("MlpPolicy", envs, seed=seed, device="cpu", policy_kwargs={"net_arch": [64, 32]}, **settings)
        model.learn(steps)
        found.append(returns_of(PPO_ENV, partial(their_action, model)))
    return found


def main(arguments: Arguments) -> None:
    """Train, compare, report."""
    torch.set_num_threads(1)
    console = Console()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    jobs = {
        "sac": (SAC_ENV, arguments.sac_steps, {"ours": our_sac, "stable-baselines3": their_sac}),
        "ppo": (PPO_ENV, arguments.ppo_steps, {"ours": our_ppo, "stable-baselines3": their_ppo}),
    }
    committed = (arguments.sac_steps, arguments.ppo_steps) == (Arguments.sac_steps, Arguments.ppo_steps)
    for algorithm in () if arguments.only_report else arguments.algorithms:
        env, steps, codes = jobs[algorithm]
        if results.get(algorithm, {}).get("steps") != steps:
            results[algorithm] = {"env": env, "steps": steps, "episodes": EPISODES, "machine": machine(), "codes": {}}
        done: dict[str, Any] = results[algorithm]["codes"]
        for code, train in codes.items():
            if code in done:
                continue
            began = time.perf_counter()
            found = train(steps)
            seconds = time.perf_counter() - began
            done[code] = {"returns": found, "seconds": round(seconds, 1)}
            console.log(f"{algorithm} {code}: {[round(float(np.mean(one)), 1) for one in found]}, {seconds:.0f} s")
            if committed:
                write_json(RESULTS, results)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # budgets of one's own leave no table
    if not results:
        return
    lines = ["| algorithm | task | code | return, each seed | mean |", "| --- | --- | --- | --- | ---: |"]
    for name, content in results.items():
        for code, one in content["codes"].items():
            means = [float(np.mean(returns)) for returns in one["returns"]]
            lines.append(
                f"| {name.upper()} | {content['env']}, {content['steps']:,} steps | {code} | "
                f"{', '.join(f'{mean:.0f}' for mean in means)} | {np.mean(means):.0f} |"
            )
    write_between(README, "core", "benchmarks/online_rl/core.py", "\n".join(lines))


if __name__ == "__main__":
    main(tyro.cli(Arguments))
