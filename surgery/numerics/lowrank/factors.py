"""Singular value decompositions cut to a rank, and their factors.

Shapes: O rows (out), I columns (in), K = min(O, I), R rank, L width of a sketch.

Why signs: a pair (u, v) is a singular pair with either sign, and which one LAPACK gives depends
on its version; here the largest |component| of each u is positive.
"""

from __future__ import annotations

import hashlib
from typing import cast

import torch
from torch import Tensor

from surgery.graph import BadValue

__all__ = [
    "balanced",
    "check_finite",
    "energy_rank",
    "generator",
    "product_svd",
    "randomized_svd",
    "sum_of_squares",
    "svd",
    "whole_svd",
    "with_signs",
]

SVD = tuple[Tensor, Tensor, Tensor]  # u [O, R], s [R], v [R, I]

POWER_ITERATIONS = 4


def whole_svd(w_OI: Tensor, *, full_matrices: bool = False) -> SVD:
    """All K triplets with LAPACK's signs; `full_matrices`: u and v are square. Raises ValueError if it fails."""
    try:
        found = torch.linalg.svd(w_OI, full_matrices=full_matrices)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    except RuntimeError as error:
        raise ValueError(f"has no singular value decomposition that LAPACK finds: {error}") from None
    u, s, v = cast(SVD, found)
    return u, s, v


def svd(w_OI: Tensor, rank: int) -> SVD:
    """The first `rank` singular triplets, exact."""
    u_OK, s_K, v_KI = whole_svd(w_OI)
    return with_signs(u_OK[:, :rank], s_K[:rank], v_KI[:rank])


def randomized_svd(w_OI: Tensor, rank: int, width: int, draw: str) -> SVD:
    """About the first `rank` singular triplets, from `width` random columns that are a function of `draw`.

    Source: Halko, Martinsson, Tropp, arXiv 0909.4061, algorithms 4.4 and 5.1. The test matrix has random signs
    rather than normal values: as good a sketch, and the same on every machine.
    """
    num_rows, num_columns = w_OI.shape
    width = min(width, num_rows, num_columns)
    signs_IL = torch.randint(0, 2, (num_columns, width), generator=generator(draw)).to(w_OI.dtype).mul_(2).sub_(1)
    q_OL = _orthonormal(w_OI @ signs_IL)
    for _ in range(POWER_ITERATIONS):
        q_OL = _orthonormal(w_OI @ _orthonormal(w_OI.T @ q_OL))
    u_LL, s_L, v_LI = whole_svd(q_OL.T @ w_OI)
    return with_signs(q_OL @ u_LL[:, :rank], s_L[:rank], v_LI[:rank])


def product_svd(b_OR: Tensor, a_RI: Tensor) -> SVD:
    """All singular triplets of b @ a, which is never formed: two QRs and the SVD of a core no larger than R x R."""
    q_OR, upper_RR = _qr(b_OR)
    p_IR, lower_RR = _qr(a_RI.T)
    u_RR, s_R, v_RR = whole_svd(upper_RR @ lower_RR.T)
    return with_signs(q_OR @ u_RR, s_R, v_RR @ p_IR.T)


def with_signs(u_OR: Tensor, s_R: Tensor, v_RI: Tensor) -> SVD:
    """The same triplets, each with the sign that makes the largest |component| of u positive."""
    largest_1R = u_OR.abs().argmax(dim=0, keepdim=True)
    signs_R = torch.where(u_OR.gather(0, largest_1R)[0] < 0, -1.0, 1.0).to(u_OR.dtype)
    return u_OR * signs_R, s_R, v_RI * signs_R.unsqueeze(1)


def balanced(triplets: SVD, rank: int, num_kept: int, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """A [rank, I] and B [O, rank] with scaling·BA = u·s·v over the first `num_kept` triplets; zeros after them.

    The root of s goes to either side, so that both train alike and neither overflows a short dtype.
    """
    u_OR, s_R, v_RI = (part.narrow(dim, 0, num_kept) for part, dim in zip(triplets, (1, 0, 0), strict=True))
    root_R = (s_R / scaling).sqrt()
    a_RI = v_RI.new_zeros(rank, v_RI.shape[1])
    b_OR = u_OR.new_zeros(u_OR.shape[0], rank)
    torch.mul(v_RI, root_R.unsqueeze(1), out=a_RI[:num_kept])
    b_OR[:, :num_kept] = u_OR * root_R
    return a_RI, b_OR


def energy_rank(s_R: Tensor, total: float, share: float) -> int:
    """How many of the singular values hold `share` of `total`, the sum of all squares; all of them if they do not."""
    if total == 0.0:
        return 0
    held_R = s_R.double().square().cumsum(0)
    return min(int((held_R < share * total).sum()) + 1, s_R.numel())


def sum_of_squares(w_OI: Tensor) -> float:
    """Of all elements, a row at a time in float32 and the rows in float64."""
    return float(w_OI.square().sum(dim=1).double().sum())


def generator(draw: str) -> torch.Generator:
    """Random numbers that are a function of the text `draw` alone."""
    seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(seed)


def check_finite(tensor: Tensor, whose: str = "") -> None:
    """Raises BadValue for a NaN or Inf, which would spread to every singular vector."""
    if not bool(tensor.isfinite().all()):
        index = int((~tensor.isfinite()).reshape(-1).nonzero()[0])
        raise BadValue(index, f"is NaN or Inf{whose}")


def _orthonormal(y_NL: Tensor) -> Tensor:
    return _qr(y_NL)[0]


def _qr(y_NL: Tensor) -> tuple[Tensor, Tensor]:
    q_NL, r_LL = cast("tuple[Tensor, Tensor]", torch.linalg.qr(y_NL))  # pyright: ignore[reportUnknownMemberType]
    return q_NL, r_LL
