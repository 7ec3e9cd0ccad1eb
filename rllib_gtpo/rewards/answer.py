"""Checking answers: numbers, mathematics, options and words.

    checker = AnswerChecker()
    verdict = await checker.acheck(extract_answer(text), r"\\frac{1}{2}")     # or check(...)
    verdict.correct, verdict.how

Equal spellings, numbers, units, and the structure of lists, intervals and sets are compared here in
microseconds.  Only what is left, pairs of formulas, goes to math-verify's parser and sympy, which
may hang on what a model writes: they run in a sandbox of their own, a fresh process for each
answer, with limits on time and memory.  Formulas travel as data and are never executed here.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rllib_gtpo.errors import ConfigError, DataError, RewardError, did_you_mean
from rllib_gtpo.rewards.answer_forms import parse, same
from rllib_gtpo.rewards.answer_spelling import MAX_CHARS, number, spell
from rllib_gtpo.rewards.answer_text import exact_match, extract_answer, f1_score
from rllib_gtpo.rewards.answer_units import letter_of
from rllib_gtpo.sandbox import Limits, PythonSandbox, SandboxResult, SandboxUnavailable

__all__ = [
    "AnswerChecker",
    "Reference",
    "Verdict",
    "exact_match",
    "extract_answer",
    "f1_score",
    "shared_checker",
]

Reference = str | int | float | list[str]
KINDS = ("math", "choice", "exact", "f1")
MAX_PAIRS = 400  # formulas of one answer that may go to the sandbox
_GRADER = Path(__file__).with_name("answer_grader.py")


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, and how that was found.

    how: "exact", "normalised" (the same after spelling, or by arithmetic), "verified" (by the
        sandbox); and where it is not right "different", "unparsable" (no formula, or too long),
        "timeout" (not decided within the limits), "missing" (no answer).
    """

    correct: bool
    how: str


_Pairs = list[tuple[str, str, str]]
_MISSING, _DIFFERENT = Verdict(False, "missing"), Verdict(False, "different")
_UNPARSABLE, _TIMEOUT = Verdict(False, "unparsable"), Verdict(False, "timeout")


class AnswerChecker:
    """Compares answers; safe to use from any thread and any event loop of its process.

    The sandbox starts with the first answer that needs it.  `counts` says how verdicts were found.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        """Grade each answer within `seconds`, of which waiting for a core does not count."""
        if not seconds > 0:
            raise ConfigError(f"AnswerChecker(seconds={seconds!r}) must be positive.")
        self.counts: Counter[str] = Counter()
        self._limits = Limits(
            cpu_seconds=0.8 * seconds, wall_seconds=0.9 * seconds, memory_mb=512, output_chars=65536
        )
        self._sandbox: PythonSandbox | None = None
        self._lock = threading.Lock()

    def check(self, given: object, reference: Reference, kind: str = "math") -> Verdict:
        """Whether `given` is an accepted answer; None is a missing one.

        Args:
            given: The answer, as `extract_answer` gives it.
            reference: The right answer, or a list of several that are accepted.
            kind: "math"; "choice", one option's letter; "exact", the same words as SQuAD counts
                them; "f1", the same words in any order.

        Raises:
            ConfigError: `kind` is unknown.
            DataError: There is no reference.
            RewardError: This host cannot grade.
        """
        verdict = self._quick(given, reference, kind)
        if isinstance(verdict, _Grade):
            try:
                sandbox = self._start()
                verdict = verdict.judge(sandbox.run(verdict.code()))
            except SandboxUnavailable as error:
                raise _host_failure(error) from error
        self.counts[verdict.how] += 1
        return verdict

    async def acheck(self, given: object, reference: Reference, kind: str = "math") -> Verdict:
        """Like `check`, without blocking the event loop; cancelling it ends the grading."""
        verdict = self._quick(given, reference, kind)
        if isinstance(verdict, _Grade):
            try:
                sandbox = self._sandbox
                if sandbox is None:  # to start one takes a while
                    sandbox = await asyncio.to_thread(self._start)
                verdict = verdict.judge(await sandbox.arun(verdict.code()))
            except SandboxUnavailable as error:
                raise _host_failure(error) from error
        self.counts[verdict.how] += 1
        return verdict

    def close(self) -> None:
        """End the sandbox; the next answer that needs one starts another."""
        with self._lock:
            sandbox, self._sandbox = self._sandbox, None
        if sandbox is not None:
            sandbox.close()

    def _start(self) -> PythonSandbox:
        with self._lock:
            if self._sandbox is None:
                self._sandbox = PythonSandbox(self._limits, preload=("math_verify",))
            return self._sandbox

    def _quick(self, given: object, reference: Reference, kind: str) -> Verdict | _Grade:
        """The verdict where no process is needed."""
        if kind not in KINDS:
            raise ConfigError(f"Unknown kind of answer {kind!r}{did_you_mean(kind, KINDS)}.")
        references = _texts(reference)
        if given is None:
            return _MISSING
        try:
            text = given if isinstance(given, str) else _text(given)
        except ValueError:
            return _UNPARSABLE
        if any(text.strip() == one.strip() for one in references):
            return Verdict(True, "exact")
        if not text.strip():
            return _MISSING
        if kind == "exact" or kind == "f1":
            equal = exact_match if kind == "exact" else (lambda a, b: f1_score(a, b) == 1.0)
            return Verdict(True, "normalised") if equal(text, references) else _DIFFERENT
        return _compare(text, references, kind)


def _text(value: object) -> str:
    """The spelling of a number.

    Raises:
        ValueError: It is no number, or has too many digits.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"an answer must be text or a number, not {type(value).__name__}")
    return str(value)


def _texts(reference: Reference) -> list[str]:
    accepted: Sequence[object] = reference if isinstance(reference, list | tuple) else [reference]
    try:
        texts = [one if isinstance(one, str) else _text(one) for one in accepted]
    except ValueError as error:
        raise DataError(
            f"The reference answer is unusable: {error}. Give text, a number or a list of texts."
        ) from None
    if not texts:
        raise DataError("The reference answer is an empty list: give at least one accepted answer.")
    return texts


def _compare(given: str, references: list[str], kind: str) -> Verdict | _Grade:
    """Compare with each reference; pairs of formulas that stay open make a `_Grade`."""
    if len(given) > MAX_CHARS:
        bare = _bare(given)
        return Verdict(True, "normalised") if bare in map(_bare, references) else _UNPARSABLE
    spelled = spell(given)
    forms = []
    for one in references:
        if len(one) > MAX_CHARS:
            continue
        target = spell(one)
        letter = letter_of(target)
        if kind == "choice" or (letter is not None and letter in "ABCDEFGHIJ"):
            chosen = letter_of(spelled)
            if kind == "choice" and chosen is not None and letter is not None:
                chosen, letter = chosen.upper(), letter.upper()
            if chosen is not None and chosen == letter:
                return Verdict(True, "normalised")
            if kind == "choice":
                continue
        if spelled == target:
            return Verdict(True, "normalised")
        forms.append(target)
    grade = _Grade(spelled, [])
    for target in forms:
        if grade.add(target):
            return Verdict(True, "normalised")
    if not grade.references:
        return _DIFFERENT
    return grade if len(grade.pairs) <= MAX_PAIRS else _UNPARSABLE


def _bare(text: str) -> str:
    return "".join(text.replace("$", "").split()).lower()


class _Grade:
    """An answer that needs the sandbox: its open pairs of formulas, and what they would decide."""

    def __init__(self, given: str, references: list[str]) -> None:
        self.given, self.references = parse(given), references
        self.pairs: dict[tuple[str, str], str] = {}  # (given, reference) -> tolerance
        self.nonce = secrets.token_hex(8)

    def add(self, reference: str) -> bool:
        """Take the reference's open pairs; True if there are none and it is equal."""
        found: list[tuple[str, str]] = []

        def note(a: str, b: str) -> bool:
            found.append((a, b))
            return True

        if not same(self.given, parse(reference), note):
            return False
        if not found:
            return True
        self.references.append(reference)
        self.pairs.update({pair: _step(*pair) for pair in found})
        return False

    def code(self) -> str:
        """The program that grades the pairs."""
        pairs = [(a, b, step) for (a, b), step in self.pairs.items()]
        return f"{_source()}\n\nmain({self.nonce!r}, {pairs!a})\n"

    def judge(self, result: SandboxResult) -> Verdict:
        """The verdict, given what the program printed and how it ended."""
        said: dict[tuple[str, str], bool | None] = {}
        order = list(self.pairs)
        for line in result.output.splitlines():
            words = line.split(" ")
            if len(words) == 3 and words[0] == self.nonce and words[1].isdigit():
                said[order[int(words[1])]] = {"True": True, "False": False}.get(words[2])
        for reference in self.references:
            if same(self.given, parse(reference), lambda a, b: said.get((a, b)) is True):
                return Verdict(True, "verified")
        if len(said) < len(order):
            return _TIMEOUT
        return _UNPARSABLE if None in said.values() else _DIFFERENT


def _step(given: str, reference: str) -> str:
    steps = [n.step for n in (number(given), number(reference)) if n is not None and n.step]
    return str(max(steps)) if steps else ""


def _source() -> str:
    return _GRADER.read_text(encoding="utf-8")


def _host_failure(error: SandboxUnavailable) -> RewardError:
    return RewardError(f"Answers cannot be graded on this host: {error}")


_shared: dict[int, AnswerChecker] = {}
_shared_lock = threading.Lock()


def shared_checker() -> AnswerChecker:
    """The process's checker with the default limits; its sandbox ends with the process."""
    with _shared_lock:
        return _shared.setdefault(os.getpid(), AnswerChecker())
