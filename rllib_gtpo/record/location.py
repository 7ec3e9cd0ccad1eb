"""Where a record is: a directory of this machine, or one of a file system that pyarrow knows."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.record.schema import DIRECTORY

POINTER = "record.json"  # there instead, if the record is elsewhere: {"path": address}
_S3_HELP = (
    "Check the address, and that credentials with the right to read and write it reach this "
    "process (environment variables, an instance role, or ~/.aws)."
)


@dataclass(frozen=True)
class Location:
    """A directory of a file system."""

    filesystem: Any
    path: str
    address: str  # what people call it

    @classmethod
    def of(cls, address: str | Path) -> Location:
        """A path of this machine, or an address such as s3://bucket/records.

        Raises:
            ConfigError: The address makes no sense, or cannot be reached.
        """
        text = str(address)
        if "://" not in text:
            return cls(fs.LocalFileSystem(), str(Path(text).expanduser().absolute()), text)
        try:
            filesystem, path = fs.FileSystem.from_uri(text)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ConfigError(f"{text}: {error}. {_S3_HELP}") from error
        return cls(filesystem, path, text)

    @property
    def local(self) -> Path | None:
        """The directory, if it is of this machine."""
        return Path(self.path) if isinstance(self.filesystem, fs.LocalFileSystem) else None

    def __truediv__(self, name: str) -> Location:
        address, mark, options = self.address.partition("?")
        return Location(
            self.filesystem, f"{self.path}/{name}", f"{address.rstrip('/')}/{name}{mark}{options}"
        )

    def exists(self) -> bool:
        """Whether there is such a directory; ConfigError if that cannot be found out."""
        return bool(self._info(self.path).type == fs.FileType.Directory)

    def make(self) -> None:
        """Makes the directory; ConfigError if that is not possible."""
        try:
            self.filesystem.create_dir(self.path, recursive=True)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{self.address} cannot be written: {error}.{self._hint}") from error

    def names(self) -> list[str]:
        """The files in it, in order; none if it does not exist.

        Raises:
            ConfigError: It cannot be read.
        """
        found = self._info(fs.FileSelector(self.path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.File)

    def _info(self, what: Any) -> Any:
        try:
            return self.filesystem.get_file_info(what)
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{self.address} cannot be read: {error}.{self._hint}") from error

    @property
    def _hint(self) -> str:
        return "" if self.local else f" {_S3_HELP}"

    def delete(self, name: str) -> None:
        """Deletes a file."""
        self.filesystem.delete_file(f"{self.path}/{name}")

    def write_text(self, text: str, name: str) -> None:
        """Writes a small file."""
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(text.encode())

    def write(self, table: pa.Table, name: str) -> None:
        """Writes a Parquet file that appears when it is complete.

        Object stores show an object only then; elsewhere it is renamed.
        """
        final = f"{self.path}/{name}"
        renames = self.local is not None
        partial = f"{self.path}/.{name}.tmp-{os.getpid()}" if renames else final
        try:
            pq.write_table(table, partial, filesystem=self.filesystem, compression="zstd")
            if renames:
                self.filesystem.move(partial, final)
        finally:
            if renames and os.path.exists(partial):
                os.unlink(partial)


def read_pointer(home: Location) -> Location | None:
    """Where a run's directory says that its record is, if it says so.

    Raises:
        ConfigError: It says nothing that makes sense.
    """
    try:
        with home.filesystem.open_input_stream(f"{home.path}/{POINTER}") as file:
            text = file.read()
    except (OSError, pa.ArrowException):
        return None
    try:
        return Location.of(json.loads(text)["path"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{home.address}/{POINTER} is damaged: {error!r}") from error


def record_of(run: str | Path | Location) -> Location:
    """The record of a run's directory; or the directory itself, which then is a record."""
    home = run if isinstance(run, Location) else Location.of(run)
    inside = home / DIRECTORY
    return read_pointer(home) or (inside if inside.exists() else home)
