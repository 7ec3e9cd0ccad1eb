"""Columns of a dataset -> fields of a task.

    columns = "gsm8k"                                              # a ready mapping
    columns = {"question": "problem", "answer": "solution"}        # field: column
    columns = {"question": ["Body", "Question"],                   # joined by a space
               "answer": {"column": "answer", "after": "####"}}    # a part of its text
    columns = {"train": "dapo-math-17k", "test": "math-500"}       # one for each split

A column inside another is written with dots, "reward_model.ground_truth" or "prompt.0.content";
"problem|question" is the first of the two that a row has.  A part of a text is cut out by

    without    these texts are taken away, where they are
    after      what follows the last occurrence of this text
    boxed      true: what \\boxed{} holds
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rllib_gtpo.errors import ConfigError, DataError, did_you_mean
from rllib_gtpo.rewards.answer_text import extract_answer
from rllib_gtpo.types import Task

_DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_BEHIND = '\n\nRemember to put your answer on its own line after "Answer:".'

READY: Mapping[str, Mapping[str, Any]] = {
    # BytedTsinghua-SIA/DAPO-Math-17k and BytedTsinghua-SIA/AIME-2024
    "dapo-math-17k": {
        "question": {"column": "prompt.0.content", "without": [_DAPO_BEFORE, _DAPO_BEHIND]},
        "answer": "reward_model.ground_truth",
    },
    # open-r1/DAPO-Math-17k-Processed:en
    "dapo-math-17k-processed": {"question": "prompt", "answer": "solution"},
    # openai/gsm8k:main
    "gsm8k": {"question": "question", "answer": {"column": "answer", "after": "####"}},
    # EleutherAI/hendrycks_math and others whose answers are inside solutions
    "math": {"question": "problem", "answer": {"column": "solution", "boxed": True}},
    # HuggingFaceH4/MATH-500[test]
    "math-500": {"question": "problem", "answer": "answer"},
    # HuggingFaceH4/aime_2024[train], Maxwell-Jia/AIME_2024[train]
    "aime-2024": {"question": "problem|Problem", "answer": "answer|Answer"},
    # math-ai/aime25[test], yentinglin/aime_2025[train], opencompass/AIME2025:AIME2025-I[test]
    "aime-2025": {"question": "problem|question", "answer": "answer"},
    # AI-MO/aimo-validation-amc[train], math-ai/amc23[test]
    "amc": {"question": "problem|question", "answer": "answer"},
    # ChilleD/SVAMP
    "svamp": {"question": ["Body", "Question"], "answer": "Answer"},
    # math-ai/minervamath[test]
    "minerva": {"question": "question", "answer": "answer"},
}
"""Mappings of well-known datasets; above each, what to write as `tasks`."""

SPLITS = ("train", "validation", "test")
_PARTS = ("column", "without", "after", "boxed")
_MISSING = object()


@dataclass(frozen=True)
class Column:
    """Where one field of a task comes from."""

    paths: tuple[str, ...]
    without: tuple[str, ...] = ()
    after: str | None = None
    boxed: bool = False

    def of(self, row: Mapping[str, Any], where: str, field: str) -> Any:
        """The field of a row; DataError if the row has no such column or text."""
        values = [self._value(row, path, where, field) for path in self.paths]
        value = values[0] if len(values) == 1 else " ".join(map(str, values))
        if not (self.without or self.after is not None or self.boxed):
            return value
        if not isinstance(value, str):
            raise DataError(
                f"{where}: the column {self.paths[0]!r} of {field!r} is no text but "
                f"{type(value).__name__}: leave out {self._cuts()} in `columns`."
            )
        return self._cut(value, where, field)

    def _value(self, row: Mapping[str, Any], paths: str, where: str, field: str) -> Any:
        for path in paths.split("|"):
            value = _at(row, path)
            if value is not _MISSING:
                return value
        raise DataError(
            f"{where}: no column {paths!r} for {field!r}"
            f"{did_you_mean(paths.split('|')[0], row)}: name the right one in `columns`."
        )

    def _cut(self, text: str, where: str, field: str) -> str:
        for unwanted in self.without:
            text = text.replace(unwanted, "")
        if self.after is not None:
            _, found, text = text.rpartition(self.after)
            if not found:
                raise DataError(
                    f"{where}: no {self.after!r} in the column {self.paths[0]!r} of {field!r}: "
                    "mend the row, or map the column as it is."
                )
        if self.boxed:
            boxed = extract_answer(text) if "\\boxed" in text else None
            if boxed is None:
                raise DataError(
                    f"{where}: no \\boxed{{}} in the column {self.paths[0]!r} of {field!r}: mend "
                    "the row, or map the column as it is."
                )
            text = boxed
        return text.strip()

    def _cuts(self) -> str:
        return ", ".join(name for name in _PARTS[1:] if getattr(self, name))


def column_mapping(
    columns: Any, split: str, splits: Iterable[str] = SPLITS
) -> Callable[[Task, str], Task] | None:
    """The mapping of a split's rows, from what `env_config["columns"]` may hold.

    Args:
        columns: See the module.
        split: The split that is read.
        splits: Every split there may be: keys that are all of these choose by split.

    Returns:
        A function of a row and of the text that says where the row is; None if rows stay as they
        are.

    Raises:
        ConfigError: `columns` is no mapping.
    """
    if isinstance(columns, Mapping) and columns and set(columns) <= set(splits):
        columns = columns.get(split)
    if columns is None:
        return None
    if isinstance(columns, str):
        if columns not in READY:
            raise ConfigError(f"columns={columns!r}: no such mapping{did_you_mean(columns, READY)}")
        columns = READY[columns]
    if not isinstance(columns, Mapping) or not columns:
        raise ConfigError(
            f"columns={columns!r}: the name of a ready mapping ({', '.join(READY)}), or "
            "{'question': column, 'answer': column}."
        )
    fields = {str(field): _column(field, spec) for field, spec in columns.items()}

    def task(row: Task, where: str) -> Task:
        return {field: column.of(row, where, field) for field, column in fields.items()}

    return task


def _column(field: str, spec: Any) -> Column:
    where = f"columns: {field}={spec!r}"
    options = dict(spec) if isinstance(spec, Mapping) else {"column": spec}
    for name in options:
        if name not in _PARTS:
            raise ConfigError(f"{where}: unknown {name!r}{did_you_mean(name, _PARTS)}")
    paths = _texts(options.get("column"), f"{where}: a column's name, or a list of names.")
    after, boxed = options.get("after"), options.get("boxed", False)
    if after is not None and (not isinstance(after, str) or not after):
        raise ConfigError(f"{where}: after={after!r}: a text.")
    if not isinstance(boxed, bool):
        raise ConfigError(f"{where}: boxed={boxed!r}: true or false.")
    without = options.get("without", ())
    return Column(
        paths, _texts(without, f"{where}: without: texts.") if without else (), after, boxed
    )


def _texts(value: Any, problem: str) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if (
        not isinstance(texts, Sequence)
        or not texts
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise ConfigError(problem)
    return tuple(texts)


def _at(row: Any, path: str) -> Any:
    """What is at a path of keys and positions; a key may itself contain dots."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    head, dot, rest = path.partition(".")
    if isinstance(row, Mapping):
        value = row.get(head, _MISSING)
    elif isinstance(row, Sequence) and not isinstance(row, str) and head.isdigit():
        value = row[int(head)] if int(head) < len(row) else _MISSING
    else:
        return _MISSING
    return _at(value, rest) if dot and value is not _MISSING else value
