"""Look-ups that lead to one another: each record holds the entry to look up next.

    user       left: desk:boss:start:
               start:k
    assistant  ```look              tool  left: desk:boss:
               start:k                    boss:m desk:p team:c
               ```
    assistant  ```look              tool  left: desk:
               boss:m                     boss:p desk:t team:z
               ```
    assistant  ```look              tool  left: none
               desk:t                     value=47
               ```
    assistant  47

An entry is a relation and the key that it leads to.  The relation to follow is the last of what is
left; the record's other entries are decoys.  Every entry of the record can be looked up, and takes
a relation off what is left: behind a decoy the environment goes on, and nothing shows the mistake
until the value is wrong, which it will be, since relations are one to one.  An entry that the
record lacks is an error and costs the turn.  A world is made from a number in the task, so rows are
small and nothing is shared.

A demonstration (`expert`) behaves in one of four ways, drawn by the task's id from the weights
`env_config["demonstrations"]`:

    solve       follows every relation, then gives the value
    wrong_turn  follows a decoy once, goes on from there, and gives the value it finds
    stop_early  gives the next key on the way as the answer
    guess       a wrong number at once, without a call

Whatever it does, each of its calls may come after a slip, with the chances `env_config["slips"]`:

    typo        the entry with another key
    malformed   the call, left unclosed

Slips are independent of the outcome, so that none of them is a sign of success.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from rllib_gtpo.errors import ConfigError
from rllib_gtpo.types import Message, Observation, Task, ToolError, ToolResult, Trajectory
from rllib_gtpo_envs.common import (
    UNCLOSED,
    ScriptedEnv,
    answered,
    assistant,
    check_range,
    check_whole,
    checked_knobs,
    distinct_tasks,
    drawn_slip,
    wrong_number,
)

START = "start"
RELATIONS = ("boss", "desk", "team", "home", "twin", "club")
DEMONSTRATIONS = {"solve": 0.25, "wrong_turn": 0.35, "stop_early": 0.25, "guess": 0.15}
"""Default weights of the behaviours in demonstrations: one in four solves the task."""
SLIPS = {"typo": 0.08, "malformed": 0.06}
"""Default chances of a slip before a call."""
MARKUP = (
    "```look\n",
    *(f"{relation}:" for relation in (START, *RELATIONS)),
    "value=",
    "none",
    "no such entry",
    UNCLOSED,
)
"""Tokens that keep turns short: `build_tokenizer(MARKUP)` for a model made from scratch."""

_LETTERS = string.ascii_lowercase


@dataclass(frozen=True)
class Knobs:
    """What `env_config` may hold.

    seed: Tasks are a function of it and of the split's name.
    hops: Fewest and most relations to follow, within 1 to 8.
    decoys: Other relations in each record, 1 to 5.
    keys: Keys of each task's world, 12 to 26, each a letter.
    spare_turns: Turns beyond what the longest task takes.
    train, validation, test: Tasks in each split.
    demonstrations: Weight of each behaviour in demonstrations; one that is left out is 0.
    slips: Chance of each slip before a call of a demonstration; one that is left out is 0.
    instructions: Whether the prompt explains the task, for a model that was not made for it.
    """

    seed: int = 0
    hops: tuple[int, int] = (4, 6)
    decoys: int = 2
    keys: int = 20
    spare_turns: int = 3
    train: int = 8000
    validation: int = 256
    test: int = 256
    demonstrations: tuple[tuple[str, float], ...] = field(default=tuple(DEMONSTRATIONS.items()))
    slips: tuple[tuple[str, float], ...] = field(default=tuple(SLIPS.items()))
    instructions: bool = False

    @staticmethod
    def of(env_config: Mapping[str, Any]) -> Knobs:
        """Checked knobs; ConfigError says what is valid."""
        knobs = checked_knobs(Knobs, env_config, DEMONSTRATIONS, SLIPS)
        check_range("hops", knobs.hops, 1, 8)
        for name, low in (
            ("decoys", 1),
            ("keys", 12),
            ("spare_turns", 0),
        ):
            check_whole(name, getattr(knobs, name), low)
        for name, high in (("decoys", len(RELATIONS) - 1), ("keys", len(_LETTERS))):
            if getattr(knobs, name) > high:
                raise ConfigError(f"env_config: {name}={getattr(knobs, name)}: at most {high}.")
        return knobs


@dataclass(frozen=True)
class World:
    """The records of a task: relation to key, and the value of every key."""

    records: Mapping[str, Mapping[str, str]]
    values: Mapping[str, str]

    def record(self, key: str, left: Sequence[str]) -> Mapping[str, str]:
        """What a look-up of the key shows; with no relation left, that is its value."""
        return self.records[key] if left else {"value": self.values[key]}

    def follow(self, key: str, relations: Iterable[str]) -> list[str]:
        """The keys on the way, the first included."""
        keys = [key]
        for relation in relations:
            keys.append(self.records[keys[-1]][relation])
        return keys


class Lookup(ScriptedEnv):
    """Look-ups that lead to one another.  `env_config`: see `Knobs`."""

    knobs: Knobs

    def __init__(self, env_config: Mapping[str, Any] | None = None) -> None:
        super().__init__(env_config)
        self.knobs = Knobs.of(self.env_config)
        self.turn_limit = self.knobs.hops[1] + 2 + self.knobs.spare_turns
        self._record: Mapping[str, str] = {}
        self._left: tuple[str, ...] = ()

    def tasks(self, split: str) -> Iterable[Task]:
        """Rows {"id", "question", "answer", "hops", "world"}; no two of all splits are equal."""
        return [dict(row) for row in _rows(self.knobs, split)]

    def world(self, task: Task) -> World:
        """All records of a task."""
        return _world(self.knobs.keys, self.knobs.decoys, int(task["world"]))

    def prompt(self, task: Task) -> str:
        """The question, by itself or (`instructions`) with an explanation."""
        if not self.knobs.instructions:
            return str(task["question"])
        left, _, entry = str(task["question"]).partition("\n")
        return (
            f"The look tool takes an entry, such as {entry}, and shows a record with new entries, "
            "each a relation and the key it leads to, and which relations are left to follow. "
            "Always look up the entry of the last relation that is left; when none is left you see "
            f"a value: reply with that number alone. {left}. First call:\n{self.call(entry)}"
        )

    def reward(self, trajectory: Trajectory, task: Task) -> dict[str, float]:
        """1 for the right value as the whole answer."""
        return {"accuracy": float(trajectory.answer == task["answer"])}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """See ToolEnv; nothing has been looked up yet."""
        first = super().reset(seed=seed, options=options)
        assert self.trajectory is not None
        self._record = {START: _start(self.trajectory.task)}
        self._left = (START, *_relations(self.trajectory.task))
        return first

    def look(self, entry: str) -> ToolResult:
        """See the record behind an entry and which relations are left.  entry: relation:key"""
        assert self.trajectory is not None, "reset() first"
        world = self.world(self.trajectory.task)
        relation, _, key = entry.strip().partition(":")
        if self._left and self._record.get(relation) == key:
            self._left = self._left[1:]
            self._record = world.record(key, self._left)
            return ToolResult("look", _shown(self._left, self._record))
        return ToolResult("look", _refused(self._left, self._record), ToolError.RAISED)

    tools = (look,)

    def demonstrate(self, task: Task, behaviour: str, rng: random.Random) -> list[Message]:
        """A demonstration of a named behaviour: what the model says and what it is answered."""
        if behaviour == "guess":
            return [assistant(wrong_number(str(task["answer"]), rng))]
        world, left = self.world(task), _relations(task)
        followed = list(left)
        if behaviour == "wrong_turn":
            hop = rng.randrange(len(left))
            decoys = [r for r in world.records[_start(task)] if r != left[hop]]
            followed[hop] = rng.choice(decoys)
        path = world.follow(_start(task), followed)
        answer = world.values[path[-1]]
        if behaviour == "stop_early":
            looked = rng.randint(1, len(left))
            answer, path = path[looked], path[:looked]
        messages: list[Message] = []
        record: Mapping[str, str] = {START: path[0]}
        slips = 0
        for number, (relation, key) in enumerate(zip((START, *followed), path, strict=False)):
            while slips < self.knobs.spare_turns and (slip := drawn_slip(self.knobs.slips, rng)):
                slips += 1
                if slip == "malformed":
                    messages += self.unclosed(f"{relation}:{key}")
                else:
                    typo = f"{relation}:{rng.choice([k for k in _LETTERS if k != key])}"
                    refused = _refused((START, *left)[number:], record)
                    messages += [assistant(self.call(typo)), answered(refused)]
            record = world.record(key, left[number:])
            shown = _shown(left[number:], record)
            messages += [assistant(self.call(f"{relation}:{key}")), answered(shown)]
        return [*messages, assistant(answer)]


def _start(task: Task) -> str:
    return str(task["question"]).rpartition(":")[2]


def _relations(task: Task) -> tuple[str, ...]:
    """The relations behind the start, in the order in which they are followed."""
    left = str(task["question"]).partition("\n")[0].removeprefix("left: ")
    return tuple(left.split(":")[-3::-1])


def _shown(left: Sequence[str], record: Mapping[str, str]) -> str:
    """What the model sees: the relations that are left, the next one last, and a record."""
    rest = "".join(f"{relation}:" for relation in reversed(left)) or "none"
    separator = ":" if left else "="
    return f"left: {rest}\n{' '.join(f'{k}{separator}{v}' for k, v in record.items())}"


def _refused(left: Sequence[str], record: Mapping[str, str]) -> str:
    return f"no such entry\n{_shown(left, record)}"


@lru_cache(maxsize=8)
def _rows(knobs: Knobs, split: str) -> tuple[Task, ...]:
    return distinct_tasks(
        lambda rng: _task(knobs, rng), split, getattr(knobs, split, 0), knobs.seed
    )


def _task(knobs: Knobs, rng: random.Random) -> Task | None:
    number = rng.getrandbits(32)
    world = _world(knobs.keys, knobs.decoys, number)
    start = rng.choice(list(world.records))
    relations = rng.choices(sorted(world.records[start]), k=rng.randint(*knobs.hops))
    path = world.follow(start, relations)
    if len(set(path)) < len(path):
        return None
    return {
        "question": _shown((START, *relations), {START: start}),
        "answer": world.values[path[-1]],
        "hops": len(relations),
        "world": number,
    }


@lru_cache(maxsize=256)
def _world(keys: int, decoys: int, number: int) -> World:
    rng = random.Random(number)
    names = rng.sample(_LETTERS, keys)
    # Every relation is one to one: who is on a wrong key stays on wrong keys.
    steps = dict(zip(RELATIONS, rng.sample(range(1, keys), decoys + 1), strict=False))
    records = {
        name: {relation: names[(index + step) % keys] for relation, step in steps.items()}
        for index, name in enumerate(names)
    }
    values = rng.sample(range(10, 100), keys)
    return World(records, dict(zip(names, map(str, values), strict=True)))
