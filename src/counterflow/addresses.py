"""Which addresses lead out of this machine, and which are policy servers'."""

from __future__ import annotations

import ipaddress

from counterflow.checks import Range

KEY_VARIABLE = "COUNTERFLOW_API_KEY"
"""The environment's variable that holds the key of a policy server, on either side."""

PORT = Range(0, 65535, integer=True)
"""Ports that can be asked for; 0 is any free one."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_server(address: str) -> bool:
    """Whether an address is that of a policy server, and not a file's or a policy's name."""
    return address.startswith(("serve://", "ws://", "wss://"))


def websocket_of(address: str) -> str:
    """Return a server's address as websockets know it: serve:// stands for ws://."""
    return "ws://" + address.removeprefix("serve://") if address.startswith("serve://") else address
