"""Which servers of a pool are asked: one that fails again and again rests, and is tried again later."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from opd.remote.address import Address


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How failures are met. Times are seconds."""

    failures: int = 3
    """In a row, after which a server rests."""
    first_rest: float = 2.0
    """It doubles with every failure after it."""
    longest_rest: float = 60.0
    first_wait: float = 0.25
    """Before a question is asked again; the limit doubles each time, and the wait is drawn below it."""
    longest_wait: float = 20.0
    refusals: int = 6
    """Times that a question may be answered with an error of the server's (5xx), or with what cannot be used."""


@dataclass
class Server:
    """One address, and how it has answered lately."""

    address: Address
    patience: Patience
    asked: int = 0
    """Questions under way."""
    failures: int = 0
    """In a row."""
    resting_until: float = 0.0
    last_fault: str = ""
    suspect: bool = False
    """It failed since it last proved that it is what it was."""
    answers: int = 0
    """Questions that it answered."""
    faults: int = 0
    """Questions that it failed to answer."""

    @property
    def out(self) -> bool:
        """Taken out after repeated failures; it comes back with its first answer."""
        return self.failures >= self.patience.failures

    def ready(self, now: float) -> bool:
        """It may be asked: one question at a time while it is on trial."""
        return not self.out or (now >= self.resting_until and self.asked == 0)

    def worked(self) -> None:
        self.failures, self.answers = 0, self.answers + 1

    def failed(self, now: float, fault: str) -> None:
        self.failures, self.faults = self.failures + 1, self.faults + 1
        self.last_fault, self.suspect = fault, True
        if self.out:
            exponent = min(self.failures - self.patience.failures, 16)
            self.resting_until = now + min(self.patience.longest_rest, self.patience.first_rest * 2.0**exponent)


@dataclass
class Breaker:
    """The servers of a pool, and when any of them last answered."""

    servers: list[Server]
    last_answer: float
    turn: int = field(default=0)

    def choose(self, now: float, avoid: Collection[Server] = ()) -> Server | None:
        """The server with the least to do, in turn among equals, rather one that is not to be avoided; None while all rest."""
        ready = [server for server in self.servers if server.ready(now)]
        preferred = [server for server in ready if not any(server is one for one in avoid)] or ready
        if not preferred:
            return None
        self.turn += 1
        places = len(self.servers)
        return min(preferred, key=lambda s: (s.asked, (self.servers.index(s) - self.turn) % places))

    def wait(self, now: float) -> float:
        """Seconds until a resting server may be tried."""
        return max(0.0, min(server.resting_until for server in self.servers) - now)

    def broken(self, now: float, patience: float) -> bool:
        """All servers are out, and none has answered for as long as a question may take."""
        return all(server.out for server in self.servers) and now - self.last_answer >= patience
