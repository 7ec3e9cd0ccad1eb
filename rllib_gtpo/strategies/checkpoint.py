"""Sharded optimizer state in a checkpoint: every learner's files, and who wrote them.

checkpoint/learner_shards/
    __0_0.distcp __1_0.distcp .metadata    as the strategy writes them
    written_by.json                        strategy, options, learners; last
"""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.strategies.base import Shards

FOLDER = "learner_shards"
_RECORD = "written_by.json"


def write_shards(
    path: str, filesystem: Any, shards: list[Shards], written_by: dict[str, Any]
) -> None:
    """Writes the files of all learners into a checkpoint."""
    filesystem, root = _folder(path, filesystem)
    files = {name: content for part in shards for name, content in part.items()}
    files[_RECORD] = json.dumps(written_by).encode()
    for name, content in files.items():
        target = PurePosixPath(root, name)
        filesystem.create_dir(str(target.parent), recursive=True)
        with filesystem.open_output_stream(str(target)) as stream:
            stream.write(content)


def read_shards(path: str, filesystem: Any, now: dict[str, Any]) -> Shards | None:
    """What `write_shards` wrote, if anything; `now`: who is to continue.

    Raises:
        ConfigError: they cannot continue from it.
    """
    filesystem, root = _folder(path, filesystem)
    record = PurePosixPath(root, _RECORD)
    if filesystem.get_file_info(str(record)).type == pyarrow.fs.FileType.NotFound:
        return None
    written_by = json.loads(_read(filesystem, str(record)))
    zero = "deepspeed" in (written_by["strategy"], now["strategy"])
    if zero and written_by != now:
        raise ConfigError(
            f"The optimizer's state was saved by {_describe(written_by)} and cannot continue with "
            f"{_describe(now)}: DeepSpeed's files are for the same stage and as many learners.  "
            "Continue with those (fsdp2's go on any number of learners), or `rllib export` the "
            "weights and start a new run with model= that directory."
        )
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(root, recursive=True))
    return {
        str(PurePosixPath(info.path).relative_to(root)): _read(filesystem, info.path)
        for info in found
        if info.type == pyarrow.fs.FileType.File and PurePosixPath(info.path) != record
    }


def _folder(path: str, filesystem: Any) -> tuple[Any, str]:
    if filesystem is None:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(str(path))
    return filesystem, str(PurePosixPath(path, FOLDER))


def _read(filesystem: Any, path: str) -> bytes:
    with filesystem.open_input_stream(path) as stream:
        content: bytes = stream.read()
    return content


def _describe(who: dict[str, Any]) -> str:
    stage = f" stage {who['stage']}" if "stage" in who else ""
    return f"{who['strategy']}{stage} on {who['learners']} learners"
