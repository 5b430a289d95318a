"""A robot with openpi's own client: runs in an environment of its own and prints, as json, what it came to know.

python openpi_robot.py '{"host": ..., "port": ..., "api_key": ..., "do": [["infer", {...}], ...]}'
"""

import json
import sys

import numpy as np
from openpi_client.action_chunk_broker import ActionChunkBroker
from openpi_client.websocket_client_policy import WebsocketClientPolicy


def plain(value):
    """Return what json can hold."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value


def arrays(value):
    """Return lists as float32 arrays, {"uint8": shape} as a dark image and {"bytes": size} as a large array."""
    if isinstance(value, list):
        return np.asarray(value, np.float32)
    if isinstance(value, dict) and "uint8" in value:
        return np.zeros(value["uint8"], np.uint8)
    if isinstance(value, dict) and "zeros" in value:
        return np.zeros(value["zeros"], value["dtype"])
    if isinstance(value, dict):
        return {name: arrays(one) for name, one in value.items()}
    return value


def attempt(action):
    """Return what comes of an action, or which error."""
    try:
        return {"result": plain(action())}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


def main():
    """Connect, do what was asked, and print what came of it."""
    told = json.loads(sys.argv[1])
    found = {"numpy": np.__version__, "done": []}
    try:
        policy = WebsocketClientPolicy(told["host"], told.get("port"), told.get("api_key"))
    except Exception as error:
        print(json.dumps({**found, "error": type(error).__name__, "message": str(error)}))  # noqa: T201
        return
    found["metadata"] = plain(policy.get_server_metadata())
    broker = ActionChunkBroker(policy, action_horizon=told.get("horizon", 1))
    for what, observation in told["do"]:
        if what == "infer":
            found["done"].append(attempt(lambda seen=observation: policy.infer(arrays(seen))))
        elif what == "step":
            found["done"].append(attempt(lambda seen=observation: broker.infer(arrays(seen))))
        elif what == "raw":
            found["done"].append(attempt(lambda seen=observation: policy._ws.send(bytes(seen)) or policy._ws.recv()))
        elif what == "leave":
            policy._ws.send(policy._packer.pack(arrays(observation)))
            policy._ws.socket.close()
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
