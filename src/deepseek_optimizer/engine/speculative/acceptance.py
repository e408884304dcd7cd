"""How likely drafts hold, by their place in a round: what has held lately. No torch."""

from __future__ import annotations

_FADING, _PRIOR = 0.97, 0.7


class Acceptance:
    """Counts with weights that fade, so that a change in the text is noticed; before a place was tried it is taken to be as the
    one before it.

    Args:
        most: drafts of a round.
        prior: what the first draft is taken to hold at before any was tried.
    """

    def __init__(self, most: int, prior: float = _PRIOR) -> None:
        self._prior = prior
        self._held, self._tried = [0.0] * most, [0.0] * most

    def of(self, j: int) -> float:
        """Estimate for draft j (from 0), given that those before it held."""
        before = self._prior if j == 0 else self.of(j - 1)
        return (self._held[j] + before) / (self._tried[j] + 1)

    def expected(self, most: int) -> list[float]:
        """Tokens of a round with 0 .. `most` drafts: 1 + a_1 + a_1 a_2 + ... (Leviathan et al. 2023, section 3.1)."""
        found, likely = [1.0], 1.0
        for j in range(most):
            likely *= self.of(j)
            found.append(found[-1] + likely)
        return found

    def count(self, drafted: int, held: int) -> None:
        """A round's outcome; drafts behind the first that fell say nothing."""
        for j in range(min(drafted, held + 1)):
            self._held[j] = self._held[j] * _FADING + (j < held)
            self._tried[j] = self._tried[j] * _FADING + 1
