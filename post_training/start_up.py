"""How long a run takes from its launch to the end of its first step, phase by phase."""

from __future__ import annotations

import time

import psutil


class StartUpClock:
    """Splits the time since this process began; the one instance is `start_up`."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        """Seconds by phase, in order."""
        self._last = psutil.Process().create_time()
        self._done = False

    def mark(self, phase: str) -> None:
        """Say that `phase` has just ended."""
        now = time.time()
        if not self._done:
            self.phases[phase] = self.phases.get(phase, 0.0) + now - self._last
        self._last = now

    def first_step(self) -> str | None:
        """Say that a step has ended.

        Returns:
            A line about all phases after the first step, else None.
        """
        if self._done:
            return None
        self.mark("first step")
        self._done = True
        parts = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.phases.items())
        return f"first step {sum(self.phases.values()):.1f} s after the launch: {parts}"


start_up = StartUpClock()
