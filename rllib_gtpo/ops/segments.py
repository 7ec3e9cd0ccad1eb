"""Sums over sets of rows that share an integer id, without a Python loop over the sets.

Shape suffixes: `_N` flat turns or other rows, `_S` sets.  Every sum is handed back per row, so that
callers stay in [N] and never index sets themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Rows `index_N` in 0..count-1; rows of one set need not be adjacent."""

    index_N: Tensor
    count: int

    @classmethod
    def of(cls, ids_N: Tensor, *more_N: Tensor) -> Segments:
        """Sets of rows that agree in every given id; ids may be any integers."""
        unique_S, index_N = torch.unique(ids_N.long(), return_inverse=True)
        segments = cls(index_N, unique_S.numel())
        for other_N in more_N:
            other = cls.of(other_N)
            segments = cls.of(segments.index_N * max(other.count, 1) + other.index_N)
        return segments

    def total(self, values_N: Tensor) -> Tensor:
        """For each row, the sum of `values_N` over the row's set.  Differentiable."""
        sums_S = values_N.new_zeros(self.count).index_add(0, self.index_N, values_N)
        return sums_S[self.index_N]

    def size(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """For each row, the number of rows in its set."""
        ones_N = torch.ones(self.index_N.shape, dtype=dtype, device=self.index_N.device)
        return self.total(ones_N)

    def mean(self, values_N: Tensor) -> Tensor:
        """For each row, the mean of `values_N` over the row's set.  Differentiable."""
        return self.total(values_N) / self.size(values_N.dtype)


@dataclass(frozen=True)
class TrajectoryRows:
    """Where each row stands in its trajectory: `position_N` from 0, `remaining_N` rows after it."""

    segments: Segments
    start_S: Tensor  # first row of each trajectory
    position_N: Tensor
    remaining_N: Tensor

    @classmethod
    def of(cls, trajectory_N: Tensor) -> TrajectoryRows:
        """Raises ValueError naming the row at which a trajectory's rows stop being adjacent."""
        ids_S, index_N, length_S = torch.unique_consecutive(
            trajectory_N.long(), return_inverse=True, return_counts=True
        )
        start_S = length_S.cumsum(0) - length_S
        same = Segments.of(ids_S)
        if same.count != ids_S.numel():
            run_S = torch.arange(ids_S.numel(), device=ids_S.device)
            first_S = run_S.new_full((same.count,), ids_S.numel())
            first_S = first_S.scatter_reduce(0, same.index_N, run_S, "amin")[same.index_N]
            run = int(torch.nonzero(first_S != run_S)[0])
            raise ValueError(
                f"row {int(start_S[run])}: trajectory {int(ids_S[run])} starts again after other "
                "rows; its turns must be adjacent and its id unique over all groups"
            )
        row_N = torch.arange(trajectory_N.numel(), device=trajectory_N.device)
        last_S = start_S + length_S - 1
        return cls(
            Segments(index_N, ids_S.numel()),
            start_S,
            position_N=row_N - start_S[index_N],
            remaining_N=last_S[index_N] - row_N,
        )


def check_rows(name: str, values: Tensor, like: Tensor | None = None, *, integer: bool) -> None:
    """Raise ValueError unless `values` is a usable [N] tensor; a bad number is named by its row."""
    if not isinstance(values, Tensor) or values.dim() != 1:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{name} must be a tensor of shape [N], got {shape}")
    if like is not None and values.shape != like.shape:
        first = min(values.numel(), like.numel())
        raise ValueError(
            f"{name} has {values.numel()} rows where rewards has {like.numel()}: row {first} is "
            "in only one of them"
        )
    if like is not None and values.device != like.device:
        raise ValueError(f"{name} is on {values.device} where rewards is on {like.device}")
    if integer:
        if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
            raise ValueError(f"{name} must hold integer ids, got {values.dtype}")
    elif not values.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {values.dtype}")
    elif not bool(torch.isfinite(values).all()):
        row = int(torch.nonzero(~torch.isfinite(values))[0])
        raise ValueError(f"row {row}: {name} is {float(values[row])}; it must be finite")


def check_constant(name: str, values_N: Tensor, rows: TrajectoryRows, hint: str) -> None:
    """Raise ValueError naming the first row whose value differs from its trajectory's first row."""
    changed_N = (values_N[1:] != values_N[:-1]) & (rows.position_N[1:] > 0)
    if bool(changed_N.any()):
        row = int(torch.nonzero(changed_N)[0]) + 1
        raise ValueError(
            f"row {row}: {name} is {values_N[row].item()} where the trajectory's earlier rows "
            f"have {values_N[row - 1].item()}; {hint}"
        )
