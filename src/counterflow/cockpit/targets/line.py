"""The line to a policy server: it breaks, and is made anew at the next question."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from counterflow.addresses import KEY_VARIABLE
from counterflow.errors import MismatchError, ServingError
from counterflow.policies import ActionSpec

if TYPE_CHECKING:
    from counterflow.serving import RemotePolicy

Answer = TypeVar("Answer")


class Line:
    """Two connections to a server: one to drive by, and one on which something can be asked beside that, from another thread.

    A key is read from the environment's COUNTERFLOW_API_KEY.

    Args:
        address: ws://host:port, or wss:// for TLS.
        patience: seconds for an answer.

    Attributes:
        expect: what the server must be found to serve at every new connection; None: anything.
        spec: its action space, where the server doesn't tell it.
    """

    def __init__(self, address: str, patience: float) -> None:
        self.address, self._patience = address, patience
        self.expect: dict[str, Any] | None = None
        self.spec: ActionSpec | None = None
        self._remote: RemotePolicy | None = None
        self._beside: RemotePolicy | None = None

    @property
    def remote(self) -> RemotePolicy:
        """The server, connected to.

        Raises:
            ServingError: it can't be reached, or refuses.
            MismatchError: it isn't what was expected.
        """
        if self._remote is None:
            self._remote = self._connect()
        return self._remote

    def ask(self, question: Callable[[RemotePolicy], Answer]) -> Answer:
        """Ask; after a failure the next one begins with a new connection.

        Raises:
            ServingError, MismatchError: as `remote` and the question raise them.
        """
        try:
            return question(self.remote)
        except ServingError:
            if self._remote is not None:
                self._remote.close()
                self._remote = None
            raise

    def ask_beside(self, question: Callable[[RemotePolicy], Answer]) -> Answer:
        """Ask on the second connection.

        Raises:
            ServingError, MismatchError: as `remote` and the question raise them.
        """
        if self._beside is None:
            self._beside = self._connect()
        try:
            return question(self._beside)
        except (ServingError, MismatchError):
            self._beside.close()
            self._beside = None
            raise

    def close(self) -> None:
        """Hang up; the next question connects again."""
        for remote in (self._remote, self._beside):
            if remote is not None:
                remote.close()
        self._remote = self._beside = None

    def _connect(self) -> RemotePolicy:
        from counterflow.serving import RemotePolicy

        key = os.environ.get(KEY_VARIABLE) or None
        return RemotePolicy(self.address, api_key=key, expect=self.expect, spec=self.spec, timeout=self._patience)
