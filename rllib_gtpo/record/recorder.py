"""Writes each iteration's share of groups, while training goes on."""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa

from rllib_gtpo.episodes import trajectory_of
from rllib_gtpo.record.credit import LearnedCredit
from rllib_gtpo.record.location import POINTER, Location, read_pointer
from rllib_gtpo.record.schema import DIRECTORY, FILE_NAME, METADATA, VERSION
from rllib_gtpo.record.settings import RecordSettings
from rllib_gtpo.record.table import Recorded, build_table

_SETTINGS = (
    *("estimator", "gamma", "estimator_options", "group_size", "groups_per_step"),
    *("uniform_groups", "overlong", "shaping", "shaping_alpha", "shaping_input"),
)

_FAILURES = (OSError, TypeError, ValueError, pa.ArrowException)  # of disks, stores, odd values


class Recorder:
    """The record of one run.

    What cannot be written, on a full disk say, is reported once and does not end the training.

    Args:
        settings: What is recorded.
        about: Settings of the run that the record's readers need, as JSON.
        load_decoder: Makes the function from a token to its text; called once.
    """

    def __init__(
        self,
        settings: RecordSettings,
        about: Mapping[str, Any],
        load_decoder: Callable[[], Callable[[int], str]],
    ) -> None:
        self._settings, self._about, self._load_decoder = settings, dict(about), load_decoder
        self._decode: Callable[[int], str] | None = None
        self._location: Location | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="record")
        self._pending: Future[None] | None = None
        self._warned = False
        self._unwritten = 0  # iterations
        if settings.path is not None:
            Location.of(settings.path).make()  # what is wrong with it is to be known at the start

    @classmethod
    def of(cls, config: Any) -> Recorder | None:
        """The recorder of a GTPOConfig, if it wants one."""
        settings = config.record_settings
        if not settings.share:
            return None

        return cls(settings, record_header(config), lambda: token_decoder(config))

    def record(
        self,
        home: Location,
        step: Any,
        iteration: int,
        ask_learners: Callable[[Sequence[int]], list[list[LearnedCredit]]],
    ) -> dict[str, float]:
        """Records a share of an iteration's complete groups.

        Args:
            home: The run's directory.
            step: The rllib_gtpo.sampling.Step that the learners were updated with.
            iteration: Counted from 1, as in the run's results.
            ask_learners: The credit that each learner computed for the groups of some ids.

        Returns:
            Metrics about it.
        """
        began = time.perf_counter()
        self.flush()
        ids = sorted({group.id for group in step.groups})
        chosen = set(random.Random(iteration).sample(ids, self._settings.count(len(ids))))
        credit = {
            (one.group_id, one.member): one
            for learner in ask_learners(sorted(chosen))
            for one in learner
        }
        recorded = []
        for episode in step.episodes:
            t = trajectory_of(episode)
            if t.group_id in chosen:
                seen = episode.get_observations()
                recorded.append(Recorded(t, seen, credit.get((t.group_id, t.member))))
        about = {**self._about, "iteration": iteration, "sampled_groups": len(ids)}
        try:
            self._decode = self._decode or self._load_decoder()
            header = {METADATA: json.dumps(about, default=str).encode()}
            table = build_table(recorded, iteration, self._decode, header)
            self._pending = self._thread.submit(self._write, home, iteration, table)
        except _FAILURES as error:
            self._warn(error)
        return {
            "record/trajectories": float(len(recorded)),
            "record/unwritten": float(self._unwritten),
            "time/record_s": time.perf_counter() - began,
        }

    def flush(self) -> None:
        """Waits until everything is written."""
        pending, self._pending = self._pending, None
        try:
            if pending is not None:
                pending.result()
        except _FAILURES as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._unwritten += 1
        if not self._warned:
            print(f"warning: the record is not being written: {error}", file=sys.stderr)
        self._warned = True

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        self._thread.shutdown()

    def _write(self, home: Location, iteration: int, table: pa.Table) -> None:
        if self._location is None:
            location = self._place(home)
            for name in location.names():  # of a run that was killed after its last checkpoint
                if FILE_NAME.format(iteration) < name <= FILE_NAME.format(10**6 - 1):
                    location.delete(name)
            self._location = location
        self._location.write(table, FILE_NAME.format(iteration))

    def _place(self, home: Location) -> Location:
        """The run's own directory of the record, which a resumed run finds again."""
        home.make()
        location = home / DIRECTORY
        if self._settings.path is not None:
            known = read_pointer(home)
            if known is not None:
                return known
            location = _free(Location.of(self._settings.path), Path(home.path).name)
            home.write_text(json.dumps({"path": location.address}) + "\n", POINTER)
        location.make()
        return location


def token_decoder(config: Any) -> Callable[[int], str]:
    """The function from a token of a GTPOConfig's tokenizer to its text."""
    tokenizer = config.load_tokenizer()
    return cache(lambda token: str(tokenizer.decode([token])))


def record_header(config: Any) -> dict[str, Any]:
    """What each file of a record says of its run."""
    return {
        "version": VERSION,
        "package": metadata.version("rllib-gtpo"),
        "algorithm": config.ALGORITHM,
        **{name: getattr(config, name) for name in _SETTINGS},
        "objective": asdict(config.build_objective()),
    }


def _free(parent: Location, name: str) -> Location:
    """A directory that holds nothing yet: two runs may have one name."""
    candidate, count = parent / name, 0
    while candidate.names():
        count += 1
        candidate = parent / f"{name}-{count}"
    return candidate
