"""Optimizer state in files that any number of learners writes, and any other number reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from rllib_gtpo.errors import GTPOError

Optimizers = Mapping[str, torch.optim.Optimizer]


def save_optimizers(optimizers: Optimizers, folder: Path) -> None:
    """Each learner writes its part; all call it."""
    tensors: dict[str, Tensor] = {}
    for name, optimizer in optimizers.items():
        for index, kept in optimizer.state_dict()["state"].items():
            for key, value in kept.items():
                tensors[f"{name}/{index}/{key}"] = torch.as_tensor(value)
    dcp.save(tensors or {"none": torch.zeros(1)}, checkpoint_id=folder, no_dist=not _group())


def load_optimizers(optimizers: Optimizers, folder: Path) -> None:
    """Reads the states into optimizers over the same parameters, cut in any way."""
    saved: dict[str, Any] = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    wanted: dict[str, Tensor] = {}
    for path, description in saved.items():
        name, _, rest = path.partition("/")
        if name not in optimizers:
            continue
        index = int(rest.partition("/")[0])
        parameters = _parameters(optimizers[name])
        if index >= len(parameters):
            raise GTPOError(
                f"The checkpoint's optimizer {name!r} has state for parameter {index}, and the "
                f"model has {len(parameters)}: it is of another architecture."
            )
        size = description.size
        like = parameters[index]
        wanted[path] = (
            torch.zeros_like(like, dtype=description.properties.dtype)
            if size == like.shape
            else torch.zeros(size, dtype=description.properties.dtype)
        )
    dcp.load(wanted, checkpoint_id=folder, no_dist=not _group())
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for path, value in wanted.items():
            owner, index_text, key = path.split("/", 2)
            if owner == name:
                state.setdefault(int(index_text), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _group() -> bool:
    return dist.is_initialized()
