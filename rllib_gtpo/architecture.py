"""The names and shapes of a checkpoint's weights, so that another model's is refused at once.

A file of its own beside the weights: they are large, and RLlib changes a learner part by part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs

from rllib_gtpo.errors import ConfigError

_FILE = "weight_shapes.json"
Shapes = Mapping[str, list[int]]


def write_shapes(path: str, filesystem: Any, shapes: Shapes) -> None:
    """Writes them into a checkpoint."""
    filesystem, file = _place(path, filesystem)
    with filesystem.open_output_stream(file) as stream:
        stream.write(json.dumps(shapes).encode())


def check_shapes(path: str, filesystem: Any, own: Shapes) -> None:
    """Raises ConfigError if a checkpoint is one of other weights; older ones do not say."""
    filesystem, file = _place(path, filesystem)
    if filesystem.get_file_info(file).type == pyarrow.fs.FileType.NotFound:
        return
    with filesystem.open_input_stream(file) as stream:
        saved: Shapes = json.loads(stream.read())
    for name in sorted(own.keys() | saved.keys()):
        if own.get(name) != saved.get(name):
            raise ConfigError(
                f"The checkpoint is one of another model: {name!r} has shape "
                f"{saved.get(name, 'none')} in it and {own.get(name, 'none')} here; nothing was "
                "loaded. Use the model= and lora= settings that it was made with."
            )


def _place(path: str, filesystem: Any) -> tuple[Any, str]:
    if filesystem is None:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(str(path))
    return filesystem, str(PurePosixPath(path, _FILE))
