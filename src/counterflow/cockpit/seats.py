"""One driver, many viewers: who has the wheel. Time is handed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Role = Literal["driver", "viewer"]
RESERVED = 15.0  # seconds for which a driver who has gone is waited for


@dataclass
class Seats:
    """Who drives.

    A page names itself by an id that outlives a reload, so that whoever comes back is known. A page that is opened twice with
    one id has two connections, of which the newest counts.

    Args:
        reserved: seconds for which the seat of a driver who has gone is kept.
    """

    reserved: float = RESERVED
    driver: str | None = None
    _here: dict[str, int] = field(default_factory=dict, init=False)
    _left: float = field(default=0.0, init=False)

    def join(self, client: str, now: float, *, watch: bool = False) -> Role:
        """Come in; the first who wants to drive gets the wheel, and so does a driver who comes back."""
        self._here[client] = self._here.get(client, 0) + 1
        if not watch and self.is_free(now):
            self.driver = client
        return self.role(client)

    def leave(self, client: str, now: float) -> bool:
        """Go; return whether the driver has gone."""
        self._here[client] = self._here.get(client, 0) - 1
        if self._here[client] > 0:
            return False
        del self._here[client]
        if client == self.driver:
            self._left = now
            return True
        return False

    def take(self, client: str, now: float) -> bool:
        """Take the wheel, where nobody holds it; return whether that worked."""
        if client in self._here and (self.is_free(now) or self.driver == client):
            self.driver = client
            return True
        return False

    def give(self, client: str) -> bool:
        """Leave the wheel to whoever takes it; return whether one had it."""
        if self.driver != client:
            return False
        self.driver = None
        return True

    def role(self, client: str) -> Role:
        """Say what somebody may do."""
        return "driver" if client == self.driver else "viewer"

    def is_free(self, now: float) -> bool:
        """Whether the wheel can be taken: nobody has it, or who had it has been gone for a while."""
        return self.driver is None or (self.driver not in self._here and now - self._left >= self.reserved)

    @property
    def people(self) -> int:
        """How many are here."""
        return len(self._here)
