"""Problems with answers: each one once, and none in training that is also held out.

Two texts are the same problem if they agree in everything but case, white space, LaTeX's spacing
and dollars, and the punctuation at the end.  A near copy of a held-out problem has at least half of
its runs of eight words: enough for a changed name or an instruction that was added, and too much
for a phrase that problems share ("where m and n are relatively prime positive integers").
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rllib_gtpo.columns import READY
from rllib_gtpo.data import NoSuchSplit, check_id, has_splits, iter_tasks
from rllib_gtpo.errors import DataError
from rllib_gtpo.types import Task

RUN = 8  # words
_SPACING = re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|\\[,;:! ()\[\]]|\$|~")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_WORD = re.compile(r"\\?\w+|[^\w\s]")


def load_problems(source: Any, split: str, columns: Any = None) -> list[Task]:
    """Tasks with a "question" and an "answer", both texts.

    A problem that repeats is taken once, and left out if its answers differ.  Training problems
    that are also held out, or near copies of such, are left out.  How many of each is printed.

    Args:
        source: See `rllib_gtpo.data.load_tasks`.
        split: What is held out from "train" are the other splits of a dict, or "validation" and
            "test"; a single file, the same for each split, has nothing to hold out.
        columns: See `rllib_gtpo.columns`.

    Raises:
        DataError: A row is unusable or the source unreadable; the message names it.
    """
    problems, left_out = _distinct(iter_tasks(source, split, columns))
    if split == "train":
        held_out = list(_held_out(source, columns))
        same = problems.keys() & {normal_form(text) for text in held_out}
        near = near_copies(problems, held_out) - same
        problems = {key: task for key, task in problems.items() if key not in same | near}
        left_out |= {"also held out": len(same), "near copies of held-out ones": len(near)}
    if not problems:
        raise DataError(f"{split}: no problem is left: {_told(left_out)}.")
    if any(left_out.values()):
        print(f"{split}: {len(problems)} problems; left out: {_told(left_out)}")
    return list(problems.values())


def _distinct(rows: Iterable[tuple[str, Task]]) -> tuple[dict[str, Task], dict[str, int]]:
    """Problems by their normal form, and how many were left out, by reason."""
    problems: dict[str, Task] = {}
    contradicted: set[str] = set()
    seen: set[tuple[str, str]] = set()
    first_with: dict[Any, str] = {}
    repeats = 0
    for where, row in rows:
        task = _problem(row, where)
        if (task["question"], task["answer"]) in seen:  # before anything that takes time
            repeats += 1
            continue
        seen.add((task["question"], task["answer"]))
        key = normal_form(task["question"])
        first = problems.setdefault(key, task)
        if first is task:
            check_id(task, where, first_with)
        elif first["answer"] == task["answer"]:
            repeats += 1
        else:
            contradicted.add(key)
    for key in contradicted:
        del problems[key]
    return problems, {"repeats": repeats, "with different answers": len(contradicted)}


def _held_out(source: Any, columns: Any) -> Iterator[str]:
    if not has_splits(source):
        return
    for split in source if isinstance(source, Mapping) else ("validation", "test"):
        if split != "train":
            try:
                for where, row in iter_tasks(source, split, columns):
                    yield _problem(row, where)["question"]
            except NoSuchSplit:
                continue


def _told(left_out: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)


def normal_form(question: str) -> str:
    """The same text for the same problem."""
    text = unicodedata.normalize("NFKC", question).casefold()
    text = _FRACTION.sub(r"\\frac", _SPACING.sub("", text))
    return "".join(text.split()).rstrip(".?!:;,")


def near_copies(questions: Mapping[str, Task], held_out: Iterable[str]) -> set[str]:
    """Keys of the questions that have at least half of the runs of words of a held-out one."""
    owners: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes = []
    for number, text in enumerate(held_out):
        runs = _runs(text)
        sizes.append(len(runs))
        for run in runs:
            owners[run].append(number)
    found = set()
    for key, task in questions.items() if owners else ():
        shared = Counter(n for run in _runs(task["question"]) for n in owners.get(run, ()))
        if any(2 * count >= sizes[number] for number, count in shared.items()):
            found.add(key)
    return found


def _runs(text: str) -> set[tuple[str, ...]]:
    words = _WORD.findall(_SPACING.sub(" ", text.casefold()))
    return {tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)}


def _problem(row: Task, where: str) -> Task:
    """The row with its question and answer as texts."""
    for field in ("question", "answer"):
        if field not in row:
            raise DataError(
                f"{where}: no {field!r} (it has {sorted(row)}): say which columns to take with "
                "env_config={'columns': {'question': ..., 'answer': ...}}, or with the name of a "
                f"ready mapping ({', '.join(READY)})."
            )
    question = row["question"]
    if not isinstance(question, str):
        raise DataError(
            f"{where}: the question is no text but {type(question).__name__}: map the column that "
            "holds it; inside chat messages that is 'prompt.0.content'."
        )
    if not question.strip():
        raise DataError(f"{where}: the question is empty: mend the row or remove it.")
    return {**row, "question": question.strip(), "answer": _answer(row["answer"], where)}


def _answer(value: Any, where: str) -> str:
    """The answer as a text; 142.0 is 142, and a list of one is what it holds."""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        return _answer(value[0], where)
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value.strip()
    kind = "empty" if value in ("", None) or value == [] else f"{value!r}"
    if isinstance(value, (list, tuple)) and len(value) > 1:
        kind = f"a list of {len(value)}"
    raise DataError(
        f"{where}: the answer is {kind}; it must be one text or number: mend the row, remove it, "
        "or map another column."
    )
