"""Float64 linear algebra of merges, in the papers' notation: y = x W, so matrices are [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

# of the pivoted Cholesky: below it the work is in matrix products already
_BLOCK: Final = 64
_ITERATIONS: Final = 40


@dataclass(frozen=True, slots=True)
class Factored:
    """T [d, w], w >= d, as R^T Z^T: Z [w, d] has orthonormal columns, R [d, d] is upper triangular.

    One form serves the inverse of a square T and the right inverse T^T (T T^T)^-1 of a wide one.
    """

    z: torch.Tensor
    r: torch.Tensor

    @classmethod
    def of(cls, matrix: torch.Tensor) -> Factored:
        """The factors of `matrix`."""
        return cls(*torch.linalg.qr(matrix.T))

    def solve(self, a: torch.Tensor) -> torch.Tensor:
        """T^-1 A."""
        found: torch.Tensor = self.z @ torch.linalg.solve_triangular(self.r.T, a, upper=False)
        return found

    def solve_right(self, a: torch.Tensor) -> torch.Tensor:
        """A T^-1."""
        found: torch.Tensor = torch.linalg.solve_triangular(self.r.T, a @ self.z, upper=False, left=False)
        return found

    def condition(self) -> float:
        """Largest over smallest singular value, within a few percent; infinite for a singular matrix, NaN for NaN.

        By power iteration on R^T R and on its inverse: all singular values would cost as much as the whole merge.
        """
        if not bool(torch.isfinite(self.r).all()):
            return float("nan")
        if not bool(self.r.diagonal().all()):
            return float("inf")
        upper = _norm(lambda x: self.r.T @ (self.r @ x), len(self.r))
        lower = _norm(self._inverse_gram, len(self.r))
        # an overflow on the way says that there is no inverse to speak of
        return (upper * lower) ** 0.5 if lower < float("inf") else float("inf")

    def _inverse_gram(self, x: torch.Tensor) -> torch.Tensor:
        half = torch.linalg.solve_triangular(self.r.T, x, upper=False)
        found: torch.Tensor = torch.linalg.solve_triangular(self.r, half, upper=True)
        return found


def _norm(apply: Callable[[torch.Tensor], torch.Tensor], size: int) -> float:
    """Largest eigenvalue of the symmetric map `apply`."""
    x = torch.randn(size, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = 0.0
    for _ in range(_ITERATIONS):
        x = apply(x / x.norm())
        value = float(x.norm())
        if not 0.0 < value < float("inf"):
            return float("inf")
    return value


def pivot_columns(x: torch.Tensor) -> tuple[int, ...] | None:
    """The d columns of `x` [d, n] that QR with column pivoting takes first, ascending; None if fewer are independent.

    Found as the pivots of the Cholesky factorisation of x^T x, which are the same and need matrix products only
    (Higham, "Accuracy and Stability of Numerical Algorithms", section 10.3). Squaring hides what is 1e-8 of the
    largest column; such a choice is far beyond what any gate lets pass.
    """
    size, count = x.shape
    gram = x.T @ x
    order = torch.arange(count)
    left = gram.diagonal().clone()
    # what rounding leaves of a column that depends on those before it
    least = count * torch.finfo(x.dtype).eps * float(left.max())
    rows = torch.zeros(_BLOCK, count, dtype=x.dtype)
    for begin in range(0, size, _BLOCK):
        end = min(begin + _BLOCK, size)
        for j in range(begin, end):
            pivot = j + int(left[j:].argmax())
            if not float(left[pivot]) > least:
                return None
            _swap(gram, order, left, rows, j, pivot)
            row = gram[j] - rows[: j - begin, j] @ rows[: j - begin]
            row /= left[j].sqrt()
            rows[j - begin] = row
            left[j + 1 :] -= row[j + 1 :].square()
        done = rows[: end - begin, end:]
        gram[end:, end:].addmm_(done.T, done, alpha=-1.0)
    return tuple(sorted(order[:size].tolist()))


def _swap(
    gram: torch.Tensor, order: torch.Tensor, left: torch.Tensor, rows: torch.Tensor, one: int, other: int
) -> None:
    """Exchange two columns of the matrix, wherever they stand."""
    if one == other:
        return
    there, back = [one, other], [other, one]
    gram[there] = gram[back]
    gram[:, there] = gram[:, back]
    rows[:, there] = rows[:, back]
    order[there] = order[back]
    left[there] = left[back]


def upper_first(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, U) with `matrix` [n, n] = R U: R upper triangular, U orthogonal (QR of the matrix read backwards)."""
    q, r = torch.linalg.qr(matrix.flip(0).T)
    return r.T.flip(0).flip(1), q.T.flip(0)


def packed(upper: torch.Tensor) -> torch.Tensor:
    """An upper triangular R [n, n] as `Linear` stores it: the rows of R^T without their zeros, [n (n + 1) / 2]."""
    n = len(upper)
    row, column = torch.tril_indices(n, n)
    return upper.T[row, column]
