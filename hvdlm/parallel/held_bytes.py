"""The bytes that come and go during a step, and what they were when most were held at once."""

from __future__ import annotations


class HeldBytes:
    """Counts memory by kind, as it is taken and freed.

    Attributes:
        now: the bytes of all kinds that are held.
        at_peak: by kind, when most were held so far.
    """

    def __init__(self, *kinds: str) -> None:
        self.now = 0
        self.at_peak = dict.fromkeys(kinds, 0)
        self._held = dict(self.at_peak)
        self._peak = 0

    def of(self, kind: str) -> int:
        """Return the bytes of a kind that are held now."""
        return self._held[kind]

    def take(self, kind: str, count: int) -> None:
        """Count ``count`` bytes more."""
        self.now += count
        self._held[kind] += count
        if self.now > self._peak:
            self._peak = self.now
            self.at_peak = dict(self._held)

    def free(self, kind: str, count: int) -> None:
        """Count ``count`` bytes less."""
        self.now -= count
        self._held[kind] -= count
