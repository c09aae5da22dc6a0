"""How long steps take, learnt from the last ones. Knows no sequences."""

LONGEST_RETRY_S = 60.0
"""Nobody is told to wait longer than that: by then all estimates are out of date."""


def retry_after_s(busy_s: float) -> float:
    """When to ask again an engine that has work for so many seconds."""
    return min(max(busy_s, 1.0), LONGEST_RETRY_S)


class Pace:
    """A line through the last steps: seconds = fixed + per_token * tokens.

    Least squares, in which a step counts less by a factor of `1 - newest_weight` with each later one. A step reads all
    weights, whatever it computes: hence the fixed part.
    """

    def __init__(self, newest_weight: float = 0.05) -> None:
        self._newest_weight = newest_weight
        self._steps = 0.0
        # Weighted means of tokens, seconds and their products.
        self._x = self._y = self._xx = self._xy = 0.0

    def add(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step."""
        self._steps += 1
        weight = max(self._newest_weight, 1 / self._steps)  # the plain mean, until there are enough steps
        self._x += weight * (num_tokens - self._x)
        self._y += weight * (seconds - self._y)
        self._xx += weight * (num_tokens * num_tokens - self._xx)
        self._xy += weight * (num_tokens * seconds - self._xy)

    def step_s(self, num_tokens: float) -> float:
        """Estimate the seconds that a step of so many tokens takes; 0 before any was seen."""
        return self._y + self._per_token * (num_tokens - self._x)

    @property
    def token_s(self) -> float:
        """Seconds a token, of whatever kind, all in all; 0 before any step was seen."""
        return self._y / self._x if self._x else 0.0

    @property
    def _per_token(self) -> float:
        spread = self._xx - self._x**2
        # Steps of nearly one size say nothing of the slope.
        if spread <= 1e-3 * self._x**2:
            return 0.0
        slope = (self._xy - self._x * self._y) / spread
        # Neither part is ever negative, whatever a disturbed step makes of the line.
        return min(max(slope, 0.0), self._y / self._x)
