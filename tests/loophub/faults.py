"""What goes wrong, where and how often: a frozen plan, and the clock that counts it down while the server runs."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["503", "500", "429", "close", "close-after", "cut", "flip", "slow", "412", "401"]
BEFORE_THE_WORK = ("503", "500", "429", "close", "412", "401")


@dataclass(frozen=True)
class Fault:
    """One way to fail.

    - "503", "500", "429" (with Retry-After and RateLimit), "412", "401" (expired token): replied before any work;
    - "close": the connection is dropped before any work; "close-after": the work is done and its reply lost;
    - "cut": half of the reply's body (of a PUT: half of the request's) and then a dropped connection;
    - "flip": one byte of the reply's body (of a PUT: of what is stored) is another; "slow": `bytes_per_second`.
    """

    kind: Kind
    match: str  # a regular expression searched in "METHOD /path?query"
    times: int = 1
    skip: int = 0  # so many matching requests pass first
    bytes_per_second: int = 1 << 20
    retry_after_seconds: int = 1


@dataclass(frozen=True)
class FaultPlan:
    """Faults in order of precedence: the first that matches and is not used up happens."""

    faults: tuple[Fault, ...] = ()


@dataclass
class FaultClock:
    """A plan in use. Safe to ask from several threads."""

    plan: FaultPlan
    asked: int = 0  # requests that have arrived
    _seen: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def due(self, request: str) -> Fault | None:
        """The fault that this request meets; counts it as happened."""
        with self._lock:
            self.asked += 1
            for number, fault in enumerate(self.plan.faults):
                if not re.search(fault.match, request):
                    continue
                seen = self._seen.get(number, 0)
                if seen >= fault.skip + fault.times:
                    continue
                self._seen[number] = seen + 1
                if seen >= fault.skip:
                    return fault
            return None

    def heal(self) -> None:
        """From now on nothing goes wrong."""
        with self._lock:
            self.plan, self._seen = FaultPlan(), {}

    def happened(self) -> int:
        """How many faults have been injected."""
        with self._lock:
            return sum(max(0, seen - self.plan.faults[number].skip) for number, seen in self._seen.items())
