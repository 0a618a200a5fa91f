"""How long a comparison may take: so many minutes for all cases, shared out among those that are left."""

import time
from collections.abc import Callable

LEAST_ROUNDS = 3
"""Turns that every contender of a case has, however long they take: fewer have no median worth its name."""


class Budget:
    """minutes: of all cases together, from now; None for no bound. clock: seconds."""

    def __init__(self, minutes: float | None, cases: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if minutes is None else clock() + 60 * minutes
        self._left = cases
        self._share = self._end

    def begin(self) -> bool:
        """The next case: whether there is time for it, of which it has an equal share with those behind it."""
        if self._end is None:
            return True
        now, left = self._clock(), self._left
        self._left -= 1
        self._share = now + (self._end - now) / max(1, left)
        return now < self._end

    def is_spent(self, rounds: int) -> bool:
        """Whether this case ends here, with `rounds` behind it."""
        return self._share is not None and rounds >= LEAST_ROUNDS and self._clock() >= self._share
