"""Division of a frame number by a number that is known only when a tenant starts: a multiplication and a shift."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from missile.errors import MisuseError

__all__ = ["LIMIT", "Divider"]

LIMIT = 1 << 31  # dividends are below


@dataclass(frozen=True, slots=True)
class Divider:
    """`n // divisor == n * magic >> shift` for all 0 <= n < LIMIT, with magic < 2**32 and shift < 64.

    Granlund and Montgomery, "Division by invariant integers using multiplication" (1994), theorem 4.2, for dividends of
    31 bits: one bit less than the word, so that the magic number fits the word for every divisor.
    """

    divisor: int

    def __post_init__(self) -> None:
        if not 1 <= self.divisor < LIMIT:
            raise MisuseError(f"Can't divide frame numbers by {self.divisor}.")

    @property
    def shift(self) -> int:
        return 31 + (self.divisor - 1).bit_length()

    @property
    def magic(self) -> int:
        return -(-(1 << self.shift) // self.divisor)

    def __call__(self, dividends: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Quotients as the GPU computes them."""
        wide = np.asarray(dividends, np.uint64) * np.uint64(self.magic)
        return np.asarray(wide >> np.uint64(self.shift), np.int64)
