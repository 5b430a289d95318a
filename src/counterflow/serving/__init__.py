"""Serving: policies over the network, to robots that speak openpi's protocol, and policies of other servers from here."""

from counterflow.errors import MissingDependencyError

try:
    import msgpack  # noqa: F401 - the one place that finds out
    import websockets  # noqa: F401
except ImportError as error:
    raise MissingDependencyError(
        f"serving needs the packages websockets and msgpack ({error}). Install them: pip install 'counterflow[serve]'."
    ) from error

from counterflow.serving.messages import MessageLimits, pack, unpack
from counterflow.serving.remote import RankedPlan, RankedRemote, RemotePolicy
from counterflow.serving.served import ServedPolicy
from counterflow.serving.server import PolicyServer, ServerSettings, running

__all__ = [
    "MessageLimits",
    "PolicyServer",
    "RankedPlan",
    "RankedRemote",
    "RemotePolicy",
    "ServedPolicy",
    "ServerSettings",
    "pack",
    "running",
    "unpack",
]
