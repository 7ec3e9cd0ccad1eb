"""The rollout record: what was sampled and what was learned from it, as Parquet files.

    rows = rllib_gtpo.record.load("runs/calculator")          # a datasets.Dataset

docs/record.md describes the columns; the setting is `reporting(record=...)`.
"""

from rllib_gtpo.record.reader import IterationFile, groups_of_rows, load, record_files

__all__ = ["IterationFile", "groups_of_rows", "load", "record_files"]
