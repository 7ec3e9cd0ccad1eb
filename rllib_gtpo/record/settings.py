"""What the setting `record` may hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rllib_gtpo.errors import ConfigError, did_you_mean

NONE = "none"
DEFAULT_SHARE = 0.25
_KEYS = ("share", "path")


@dataclass(frozen=True)
class RecordSettings:
    """Which share of an iteration's groups is recorded, and where.

    share: 0 to 1; above 0 at least one group of each iteration is.
    path: A directory, or an address such as s3://bucket/records, in which every run gets a
        directory of its own; None: the run's own directory.
    """

    share: float
    path: str | None = None

    @classmethod
    def of(cls, record: Any) -> RecordSettings:
        """Of "none", a share, or {"share": ..., "path": ...}; ConfigError for anything else."""
        if record == NONE:
            return cls(0.0)
        given = record if isinstance(record, Mapping) else {"share": record}
        for key in given:
            if key not in _KEYS:
                raise ConfigError(f"record: unknown {key!r}{did_you_mean(key, _KEYS)}")
        share, path = given.get("share", DEFAULT_SHARE), given.get("path")
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not number or not 0.0 <= share <= 1.0:
            raise ConfigError(
                f"record={record!r}: 'none', the share of groups to record (0 to 1), or "
                "{'share': 0.25, 'path': 's3://bucket/records'}."
            )
        if path is not None and (not isinstance(path, str) or not path):
            raise ConfigError(f"record: path={path!r}: a directory, or an address like s3://...")
        if path is not None and not share:
            raise ConfigError(f"record: path={path!r} has no effect with share=0: leave it out.")
        return cls(float(share), path)

    def count(self, groups: int) -> int:
        """How many of an iteration's groups are recorded."""
        return min(groups, max(1, round(self.share * groups))) if self.share else 0
