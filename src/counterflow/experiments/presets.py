"""Settings of the offline algorithms by environment: the official ones ("paper"), and ones for two cores ("small").

Sources: RQL, aoberai/rql (hyperparameters.sh); FQL and IFQL, seohongpark/fql (README); QGF, zhouzypaul/qgf (README,
scripts/bc_iql_train.py and defaults).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from counterflow.checks import check_name
from counterflow.errors import UnknownNameError
from counterflow.experiments.offline import CONFIGS, OfflineRun
from counterflow.learning import BCConfig
from counterflow.learning.offline import OfflineConfig
from counterflow.policies import NetworkConfig

PresetName = Literal["small", "paper"]

# Of a family's name (its beginning is enough) the settings that differ from the algorithm's own; the first that fits counts.
RQL: dict[str, dict[str, Any]] = {
    "scene": {"alpha": 3.0, "expectile": 0.7, "rho": 0.5, "horizon": 5},
    "puzzle-3x3": {"alpha": 1.0, "expectile": 0.7, "rho": 0.5, "horizon": 5},
    "puzzle-4x": {"alpha": 1.0, "expectile": 0.9, "rho": 0.5, "horizon": 5},
    # cube-single is not among the fifty tasks: it gets what cube-double has.
    "cube-single": {"alpha": 10.0, "expectile": 0.9, "rho": 0.5, "horizon": 5},
    "cube-double": {"alpha": 10.0, "expectile": 0.9, "rho": 0.5, "horizon": 5},
    "cube-triple": {"alpha": 1.0, "expectile": 0.9, "rho": 0.5, "horizon": 5},
    "cube-": {"alpha": 1.0, "expectile": 0.7, "rho": 0.5, "horizon": 5},
    "antmaze-giant": {"alpha": 0.1, "expectile": 0.5, "rho": 0.5, "horizon": 1, "discount": 0.995},
    "antmaze": {"alpha": 0.1, "expectile": 0.5, "rho": 0.5, "horizon": 1},
    "humanoidmaze": {"alpha": 0.3, "expectile": 0.5, "rho": 0.0, "horizon": 1, "discount": 0.995},
    # Not among the fifty tasks either: the other locomotion tasks' settings.
    "antsoccer": {"alpha": 0.1, "expectile": 0.5, "rho": 0.5, "horizon": 1, "discount": 0.995},
    "pointmaze": {"alpha": 0.1, "expectile": 0.5, "rho": 0.5, "horizon": 1},
}
FQL: dict[str, dict[str, Any]] = {
    "antmaze-giant": {"alpha": 10.0, "discount": 0.995, "aggregation": "min"},
    "antmaze": {"alpha": 10.0, "aggregation": "min"},
    "humanoidmaze": {"alpha": 30.0, "discount": 0.995},
    "antsoccer": {"alpha": 10.0, "discount": 0.995},
    "puzzle": {"alpha": 1000.0},
    "scene": {"alpha": 300.0},
    "cube": {"alpha": 300.0},
    "pointmaze": {"alpha": 10.0},
}
DISCOUNTS: dict[str, dict[str, Any]] = {
    name: {"discount": 0.995} for name in ("antmaze-giant", "humanoidmaze", "antsoccer")
}
# The QGF paper's four environments, each with data of 100 million transitions.
QGF_PAPER = {"discount": 0.999, "width": 1024, "batch_size": 1024, "horizon": 5}
QGF: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("cube-triple", "cube-quadruple", "puzzle-4x4", "scene"), QGF_PAPER),
    # Not among them: theirs for what is as large, and the official code's defaults with chunks of five for the rest.
    **dict.fromkeys(("cube-octuple", "puzzle-4x"), QGF_PAPER),
    **{name: {"discount": 0.99, "horizon": 5} for name in ("cube", "puzzle")},
    **{name: {**found, "horizon": 1} for name, found in DISCOUNTS.items()},
    **{name: {"horizon": 1} for name in ("antmaze", "pointmaze")},
}
OFFICIAL = {"rql": RQL, "qgf": QGF, "fql": FQL, "ifql": DISCOUNTS}
SINGLE_STEP = ("fql", "ifql")  # their official code knows no chunks
SPARSE = ("scene", "puzzle")  # where the official runs of RQL, and of no other, make the reward 0 or -1
PAPER_RUN = {
    "rql": OfflineRun(steps=1_000_000, episodes=50),
    "qgf": OfflineRun(steps=500_000, episodes=30),
    "fql": OfflineRun(steps=1_000_000, episodes=50),
    "ifql": OfflineRun(steps=1_000_000, episodes=50),
}

# Two cores: narrower, with chunks of five and the same rewards for everything, so that what differs between the algorithms is the
# algorithm. A hundred times fewer updates than the official runs take larger steps: learning rate and targets move three to four
# times as fast.
SMALL: dict[str, Any] = {
    "width": 256,
    "depth": 2,
    "batch_size": 128,
    "horizon": 5,
    "learning_rate": 1e-3,
    "target_rate": 0.02,
}
SMALL_OWN: dict[str, dict[str, Any]] = {
    "rql": {"members": 3, "average": 0.99, "flow_steps": 5},
    "qgf": {},
    "fql": {},
    "ifql": {},
}
SMALL_SCENE = {
    "discount": 0.99
}  # the other algorithms' there; QGF's own is made for networks and data of the paper's size
SMALL_RUN = OfflineRun(steps=8_000, evaluate_every=4_000, episodes=20, checkpoint_every=2_000, report_every=500)


def preset(algorithm: str, env: str, name: PresetName) -> tuple[OfflineConfig, OfflineRun]:
    """Return an algorithm's settings for an environment, and its run's.

    Raises:
        UnknownNameError: no such algorithm or preset, or no settings are known for the environment's family.
    """
    if algorithm not in CONFIGS:
        raise UnknownNameError("offline algorithm", algorithm, CONFIGS)
    check_name("preset", name, PresetName)
    family = env.split("/")[-1]
    table = OFFICIAL[algorithm]
    own = next((found for begin, found in table.items() if family.startswith(begin)), None)
    if own is None:
        if algorithm != "ifql":
            raise UnknownNameError("family with official settings", family, table)
        own = {}
    if algorithm in SINGLE_STEP:
        own = {"horizon": 1, **own}
    sparse = family.startswith(SPARSE)
    if name == "paper":
        return CONFIGS[algorithm](**own), replace(PAPER_RUN[algorithm], sparse=sparse and algorithm == "rql")
    scene = SMALL_SCENE if family.startswith("scene") else {}
    return CONFIGS[algorithm](**{**own, **SMALL, **SMALL_OWN[algorithm], **scene}), replace(SMALL_RUN, sparse=sparse)


def cloning_preset(env: str, name: PresetName) -> BCConfig:
    """Return settings of behaviour cloning: a prior of a few minutes, or the flow of QGF's official code for this environment.

    Raises:
        UnknownNameError: no such preset, or no official settings are known for the environment's family.
    """
    check_name("preset", name, PresetName)
    if name == "small":
        return BCConfig()
    flow, run = preset("qgf", env, "paper")
    return BCConfig(
        horizon=flow.horizon,
        network=NetworkConfig("normed_mlp", flow.width, flow.depth),
        steps=run.steps,
        batch_size=flow.batch_size,
        learning_rate=flow.learning_rate,
        schedule="constant",
        time_law="grid",
        average=0.0,
        observation_normalisation="none",
        precision="float32",
    )
