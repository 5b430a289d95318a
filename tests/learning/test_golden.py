"""Our losses against numbers that the official JAX code produced once: RQL aoberai/rql, QGF zhouzypaul/qgf, FQL seohongpark/fql.

Other files of the same layout may be put in the place of these: sizes, layers, members and settings are read from them.
Actions are sampled by what acts after a training: a `FlowPolicy` with the trained network in it, steered and guided.
"""

import ast
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counterflow.data.transitions import Chunks, Windows
from counterflow.learning.fql import FQLConfig, FQLDraws, FQLLearner, FQLNetworks, fql_loss
from counterflow.learning.iql import IQLNetworks, critic_loss, value_loss
from counterflow.learning.offline import Sizes
from counterflow.learning.qgf import FlowDraws, policy_loss
from counterflow.learning.rql import RQLConfig, RQLDraws, RQLLearner, RQLNetworks, rql_loss
from counterflow.policies import ActionSpec, FlowPolicy, NetworkConfig, Normaliser
from counterflow.policies.stacked import StackedMLP
from counterflow.steering import ChunkCritic, CriticBinding, CriticConfig, CriticGuidance, SteeredPolicy

FOLDER = Path(__file__).parents[1] / "data_files" / "golden"
LOSS, GRADIENT = 1e-5, 1e-4
# Of each kind of layer: our names of its parts, theirs, and how many axes they have without members.
KINDS = {
    "Dense": {"weights": ("kernel", 2), "biases": ("bias", 1)},
    "LayerNorm": {"scales": ("scale", 1), "offsets": ("bias", 1)},
}


class Golden:
    """One file: its settings, and its arrays as tensors."""

    def __init__(self, name: str) -> None:
        self.arrays = dict(np.load(FOLDER / f"{name}.npz"))
        self.config = ast.literal_eval(str(self.arrays.pop("config")))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[key]))

    def under(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): self[key] for key in self.arrays if key.startswith(prefix)}

    def layers(self, prefix: str) -> dict[str, list[torch.Tensor]]:
        """Return a network's parts in the order of its layers, members first."""
        found = self.under(prefix)
        count = {kind: sum(key.startswith(f"{kind}_") and key.count("/") == 1 for key in found) // 2 for kind in KINDS}
        assert count["Dense"], f"no layers under {prefix}"
        return {
            mine: [_members(found[f"{kind}_{layer}/{theirs}"], dims) for layer in range(count[kind])]
            for kind, names in KINDS.items()
            for mine, (theirs, dims) in names.items()
        }


def _members(array: torch.Tensor, dims: int) -> torch.Tensor:
    """Give an array its leading axis of members, and vectors a row axis."""
    array = array if array.ndim > dims else array[None]
    return array if dims == 2 else array[:, None]


def network_of(parts: dict[str, list[torch.Tensor]], norm: str) -> StackedMLP:
    weights = parts["weights"]
    hidden = [weight.shape[2] for weight in weights[:-1]]
    network = StackedMLP(
        weights[0].shape[1],
        weights[-1].shape[2],
        weights[0].shape[0],
        hidden,
        norm=norm if parts["scales"] else "none",
        norm_last=len(parts["scales"]) == len(hidden),
    )
    fill(network, parts)
    return network


def fill(network: StackedMLP, parts: dict[str, list[torch.Tensor]]) -> None:
    with torch.no_grad():
        for kind, values in parts.items():
            own = getattr(network, kind)
            assert len(own) == len(values)
            for mine, value in zip(own, values, strict=True):
                mine.copy_(value)


Pairs = list[tuple[torch.Tensor, torch.Tensor]]
"""What we found, and what the official code did."""


def compared(network: StackedMLP, parts: dict[str, list[torch.Tensor]], of: str) -> Pairs:
    """Pair gradients (of = "grad") or values with those of a file."""
    pairs = []
    for kind, values in parts.items():
        for mine, value in zip(getattr(network, kind), values, strict=True):
            found = mine.detach() if of == "value" else torch.zeros_like(mine) if mine.grad is None else mine.grad
            pairs.append((found.clone(), value))
    return pairs


def check(found: dict[str, Pairs]) -> None:
    """Losses to 1e-5 relative, everything else to 1e-4 absolute."""
    for quantity, pairs in found.items():
        assert pairs
        for ours, official in pairs:
            if quantity == "losses":
                torch.testing.assert_close(ours.reshape(()), official.reshape(()), rtol=LOSS, atol=1e-6)
            else:
                torch.testing.assert_close(ours, official, rtol=0, atol=GRADIENT)


def acting(name: str, network: StackedMLP, observation: int, horizon: int, action: int) -> FlowPolicy:
    """Return the policy that a learner hands on, with a file's network in it, whatever the sizes of its layers."""
    ones = (1.0,) * action
    spec = ActionSpec(horizon, action, tuple(-one for one in ones), ones)
    plain = Normaliser(torch.zeros(observation), torch.ones(observation), "none")
    policy = FlowPolicy(NetworkConfig(name), plain, spec)  # type: ignore[arg-type]
    assert policy.network.stack.inputs == network.inputs
    policy.network.stack = network
    return policy.requires_grad_(False)


def act(policy: FlowPolicy, observations: torch.Tensor, noise: torch.Tensor, steps: int, **ports: Any) -> torch.Tensor:
    """Return flattened chunks (B, H * A) denoised from given noise."""
    spec = policy.action_spec

    def start(*_: object) -> tuple[torch.Tensor, torch.Tensor]:
        return noise.unflatten(1, (spec.horizon, spec.dim)), noise.new_zeros(len(noise))

    steered = SteeredPolicy(policy, start, steps=steps, **ports)
    return steered.act(observations, rng=0).actions.flatten(1)


def deviations() -> dict[str, dict[str, float]]:
    """Return the largest deviation of every quantity of every file: relative for losses, absolute for the others."""
    found = {"rql": rql_compared(Golden("rql")), "qgf": qgf_compared(Golden("qgf")), "fql": fql_compared(Golden("fql"))}
    return {
        name: {
            quantity: max(
                float((ours - official).abs().max() / (official.abs().max() if quantity == "losses" else 1))
                for ours, official in pairs
            )
            for quantity, pairs in quantities.items()
        }
        for name, quantities in found.items()
    }


# RQL


@pytest.fixture
def rql() -> Golden:
    return Golden("rql")


def rql_layers(golden: Golden, kind: str, network: str) -> dict[str, list[torch.Tensor]]:
    if network.endswith("actor"):
        parts = golden.layers(f"{kind}/modules_{network}/actor_net/")
        mean = golden.under(f"{kind}/modules_{network}/mean_net/")
        parts["weights"].append(mean["kernel"][None])
        parts["biases"].append(mean["bias"][None, None])
        return parts
    return golden.layers(f"{kind}/modules_{network}/value_net/")


def rql_networks(golden: Golden) -> RQLNetworks:
    return RQLNetworks(
        **{
            name: network_of(rql_layers(golden, "params", name), "after")
            for name in ("actor", "value", "target_actor", "target_value")
        }
    )


def rql_config(golden: Golden) -> RQLConfig:
    given = golden.config
    return RQLConfig(
        horizon=given["h"],
        discount=given["discount"],
        batch_size=golden["batch/rewards"].shape[1],
        learning_rate=given["lr"],
        target_rate=given["tau"],
        flow_steps=given["flow_steps"],
        alpha=given["alpha"],
        expectile=given["expectile"],
        rho=given["rho"],
        members=given["ensemble_ct"],
        average=given["ema"],
        compile=False,
    )


def rql_batch(golden: Golden) -> Windows:
    # time first there, (h + 1, B, ...); seeds, rows, time here
    batch, names = golden.under("batch/"), Windows.__dataclass_fields__
    return Windows(**{name: batch[name].transpose(0, 1)[None] for name in names})


def rql_draws(golden: Golden) -> RQLDraws:
    draws = golden.under("draw/")
    rows = golden["batch/rewards"].shape[1]
    return RQLDraws(
        next_noise=draws["next_noise"].reshape(1, rows, -1),
        reversal=draws["reverse_fraction"].reshape(1, rows),
        noise=draws["bc_noise"].reshape(1, rows, -1),
        t=draws["bc_time"].reshape(1, rows),
    )


class FromFile(RQLLearner):
    """The learner with a file's networks, whatever their sizes."""

    golden: Golden

    def build(self) -> dict[str, StackedMLP]:
        self.parts = rql_networks(self.golden)
        return dict(vars(self.parts))


def rql_learner(golden: Golden) -> FromFile:
    FromFile.golden = golden
    sizes = Sizes(golden["batch/observations"].shape[-1], golden["batch/actions"].shape[-1], golden.config["h"])
    learner = FromFile(sizes, rql_config(golden), [0])
    for name, network in vars(learner.parts).items():  # the learner begins with weights of its own
        fill(network, rql_layers(golden, "params", name))
    return learner


def rql_compared(golden: Golden) -> dict[str, Pairs]:
    networks = rql_networks(golden)
    total, numbers = rql_loss(networks, rql_batch(golden), rql_draws(golden), rql_config(golden))
    total.sum().backward()
    names = (("critic_loss",) * 2, ("actor_loss",) * 2, ("bc_loss",) * 2, ("value", "q"))
    losses = [(total, golden["loss/total_loss"])]
    losses += [(numbers[ours], golden[f"loss/{theirs}"]) for ours, theirs in names]
    gradients = [
        pair
        for name, network in vars(networks).items()
        for pair in compared(network, rql_layers(golden, "grad", name), "grad")
    ]

    learner = rql_learner(golden)
    learner.apply(rql_batch(golden), rql_draws(golden))
    updated = [
        pair
        for name, network in vars(learner.parts).items()
        for pair in compared(network, rql_layers(golden, "after_update", name), "value")
    ]
    observations, config = golden["batch/observations"][0], golden.config
    sizes = observations.shape[-1], config["h"], golden["batch/actions"].shape[-1]
    policy = acting("plain_mlp", rql_networks(golden).target_actor, *sizes)
    actions = act(policy, observations, golden["sample/noise"], config["flow_steps"])
    return {
        "losses": [(ours.detach(), official) for ours, official in losses],
        "gradients": gradients,
        "parameters after an update": updated,
        "sampled actions": [(actions, golden["sample/actions"])],
    }


def test_golden_rql(rql: Golden) -> None:
    check(rql_compared(rql))


# QGF


@pytest.fixture
def qgf() -> Golden:
    return Golden("qgf")


def qgf_layers(golden: Golden, kind: str, network: str) -> dict[str, list[torch.Tensor]]:
    if network != "policy":
        return golden.layers(f"{kind}/{network}/value_net/")
    parts, last = golden.layers(f"{kind}/policy/MLP_0/"), golden.layers(f"{kind}/policy/")
    return {name: [*parts[name], *last[name]] for name in parts}


def qgf_networks(golden: Golden) -> tuple[StackedMLP, IQLNetworks]:
    names = ("critic", "target_critic", "value")
    return (
        network_of(qgf_layers(golden, "params", "policy"), "before"),
        IQLNetworks(**{name: network_of(qgf_layers(golden, "params", name), "before") for name in names}),
    )


def qgf_batch(golden: Golden) -> Chunks:
    batch = golden.under("batch/")
    last = {name: batch[name][:, -1][None] for name in ("next_observations", "rewards", "masks", "valid")}
    return Chunks(observations=batch["observations"][None], actions=batch["actions"][None], **last)


def qgf_compared(golden: Golden) -> dict[str, Pairs]:
    policy, networks = qgf_networks(golden)
    batch, config = qgf_batch(golden), golden.config
    losses = {
        "policy": policy_loss(policy, batch, FlowDraws(golden["draw/noise"][None], golden["draw/time"][None])),
        "critic": critic_loss(networks, batch, config["discount"] ** config["horizon_length"])[0],
        "value": value_loss(networks, batch, config["expectile"], config["q_aggregation"]),
    }
    sum(losses.values()).sum().backward()
    gradients = [
        pair
        for name in losses
        for pair in compared(
            policy if name == "policy" else getattr(networks, name), qgf_layers(golden, "grad", name), "grad"
        )
    ]
    return {
        "losses": [(loss.detach(), golden[f"loss/{name}"]) for name, loss in losses.items()],
        "gradients": gradients,
        "sampled actions": qgf_samples(golden, policy, networks),
    }


def qgf_samples(golden: Golden, network: StackedMLP, networks: IQLNetworks) -> Pairs:
    """Pair guided chunks with every sample in the file, whose names say the weight, and whether with the Jacobian."""
    observations, config = golden["batch/observations"], golden.config
    horizon, action = golden["batch/actions"].shape[1:]
    policy = acting("normed_mlp", network, observations.shape[-1], horizon, action)
    judge = networks.target_critic.requires_grad_(False)
    critic = ChunkCritic(
        CriticConfig("observation", judge.count),
        CriticBinding("", "", horizon, action),
        policy.observation_normaliser,
        torch.nn.Sequential(judge),  # not compared with the configuration's architecture: the file has its own
    )
    pairs = []
    for name, official in golden.under("sample/").items():
        if name == "noise":
            continue
        told = dict(part.split("=") for part in name.split("/"))
        guidance = CriticGuidance(
            critic,
            policy,
            float(told["weight"]),
            jacobian=told["jacobian"] == "True",
            aggregation=config["q_aggregation"],
        )
        noise, steps = golden["sample/noise"], config["denoise_steps"]
        pairs.append((act(policy, observations, noise, steps, guidance=guidance), official))
    return pairs


def test_golden_qgf(qgf: Golden) -> None:
    check(qgf_compared(qgf))


# FQL


@pytest.fixture
def fql() -> Golden:
    return Golden("fql")


FQL_NAMES = {
    "flow": "actor_bc_flow/mlp",
    "one_step": "actor_onestep_flow/mlp",
    "critic": "critic/value_net",
    "target_critic": "target_critic/value_net",
}


def fql_layers(golden: Golden, kind: str, network: str) -> dict[str, list[torch.Tensor]]:
    return golden.layers(f"{kind}/modules_{FQL_NAMES[network]}/")


def fql_compared(golden: Golden) -> dict[str, Pairs]:
    networks = FQLNetworks(**{name: network_of(fql_layers(golden, "params", name), "after") for name in FQL_NAMES})
    given, batch = golden.config, golden.under("batch/")
    config = FQLConfig(
        horizon=1,
        discount=given["discount"],
        flow_steps=given["flow_steps"],
        alpha=given["alpha"],
        aggregation=given["q_agg"],
        normalise_q=given["normalize_q_loss"],
    )
    actions = batch.pop("actions")[None, :, None]
    rows = {name: array[None] for name, array in batch.items()}
    draws = {name: array[None] for name, array in golden.under("draw/").items()}
    total, numbers = fql_loss(
        networks,
        Chunks(actions=actions, valid=torch.ones_like(rows["rewards"]), **rows),
        FQLDraws(draws["next_noise"], draws["bc_noise"], draws["bc_time"][..., 0], draws["distill_noise"]),
        config,
    )
    total.sum().backward()
    names = (
        ("critic_loss", "critic/critic_loss"),
        ("actor_loss", "actor/actor_loss"),
        ("bc_loss", "actor/bc_flow_loss"),
        ("distill_loss", "actor/distill_loss"),
        ("q", "critic/q_mean"),
    )
    losses = [(total, golden["loss/total"]), *((numbers[ours], golden[f"loss/{theirs}"]) for ours, theirs in names)]
    return {
        "losses": [(ours.detach(), official) for ours, official in losses],
        "gradients": [
            pair
            for name, network in vars(networks).items()
            for pair in compared(network, fql_layers(golden, "grad", name), "grad")
        ],
    }


def test_golden_fql(fql: Golden) -> None:
    check(fql_compared(fql))


def test_golden_learners_move_every_network_of_a_seed() -> None:
    """The learners' own networks give the losses' gradients a place: none stays where it began."""
    learner = FQLLearner(Sizes(3, 2, 2), FQLConfig(horizon=2, width=8, depth=2, batch_size=4, compile=False), [0, 1])
    before = {name: [one.clone() for one in network.parameters()] for name, network in learner.networks.items()}
    rng = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn((2, 4, *shape), generator=rng)

    one = torch.ones(2, 4)
    batch = Chunks(draw(3), draw(2, 2).clamp(-1, 1), draw(3), draw(), one, one)
    learner.apply(batch, FQLDraws(draw(4), draw(4), draw().sigmoid(), draw(4)))
    for name, network in learner.networks.items():
        moved = [not torch.equal(old, new) for old, new in zip(before[name], network.parameters(), strict=True)]
        # a target follows what stood before the step, which it equalled
        assert any(moved) != name.startswith("target"), name
