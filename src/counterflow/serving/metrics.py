"""Numbers about a server, in Prometheus's text format (version 0.0.4). Written and read by one thread."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Count:
    """A number that grows (a counter), or goes up and down (a gauge), for each value of at most one label.

    Args:
        name: as Prometheus knows it.
        text: what it is, in a line.
        kind: "counter" or "gauge".
        label: the label's name, "" for none.
        values: the label's values, so that a number exists before the first event.
    """

    def __init__(
        self, name: str, text: str, kind: str = "counter", label: str = "", values: Sequence[str] = ()
    ) -> None:
        self.name, self.text, self.kind, self.label = name, text, kind, label
        self._values: dict[str, float] = dict.fromkeys(values or ("",), 0.0)

    def add(self, amount: float = 1.0, value: str = "") -> None:
        """Add to the number of one of the label's values."""
        self._values[value] += amount

    def read(self, value: str = "") -> float:
        """Return the number of one of the label's values."""
        return self._values[value]

    def lines(self) -> list[str]:
        """Write it."""
        head = [f"# HELP {self.name} {self.text}", f"# TYPE {self.name} {self.kind}"]
        labels = {value: f'{{{self.label}="{value}"}}' if self.label else "" for value in self._values}
        return head + [f"{self.name}{labels[value]} {number:g}" for value, number in self._values.items()]


class Histogram:
    """How often a number was at most so large.

    Args:
        name: as Prometheus knows it.
        text: what it is, in a line.
        bounds: upper bounds of the buckets, ascending.
    """

    def __init__(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> None:
        self.name, self.text, self.bounds = name, text, tuple(bounds)
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, number: float) -> None:
        """Count a number."""
        self._counts[bisect_left(self.bounds, number)] += 1
        self._sum += number

    @property
    def count(self) -> int:
        """How many numbers were counted."""
        return sum(self._counts)

    def lines(self) -> list[str]:
        """Write it."""
        found, total = [f"# HELP {self.name} {self.text}", f"# TYPE {self.name} histogram"], 0
        for bound, count in zip((*self.bounds, float("inf")), self._counts, strict=True):
            total += count
            found.append(f'{self.name}_bucket{{le="{"+Inf" if bound == float("inf") else f"{bound:g}"}"}} {total}')
        return [*found, f"{self.name}_sum {self._sum:.9g}", f"{self.name}_count {total}"]


class Metrics:
    """All numbers of a server."""

    def __init__(self) -> None:
        self.requests = Count(
            "counterflow_requests_total",
            "Requests, by what became of them: answered; refused (the client's mistake); failed (the server's); timed_out; "
            "dropped (the client had gone).",
            label="outcome",
            values=("answered", "refused", "failed", "timed_out", "dropped"),
        )
        self.clients = Count(
            "counterflow_connections_total",
            "Connections, by what became of them: accepted; unauthorised; mismatched (another policy was expected); full.",
            label="outcome",
            values=("accepted", "unauthorised", "mismatched", "full"),
        )
        self.connections = Count("counterflow_connections", "Open connections.", "gauge")
        self.waiting = Count("counterflow_waiting_requests", "Requests that wait or are being decided.", "gauge")
        self.received = Count("counterflow_received_bytes_total", "Bytes of received messages.")
        self.total = Histogram("counterflow_request_seconds", "From a message's arrival to its answer.")
        self.inference = Histogram("counterflow_inference_seconds", "Deciding on a batch.")
        self.batch = Histogram("counterflow_batch_size", "Requests in a batch.", SIZES)

    def text(self) -> str:
        """Write everything."""
        return "\n".join(line for metric in vars(self).values() for line in metric.lines()) + "\n"
