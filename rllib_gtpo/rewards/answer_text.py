"""Finding the answer in a text, and comparing answers as words, as SQuAD does.

All functions take time linear in their input: a model writes it.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

SHORT = 200  # characters of a text that may be the answer as a whole
TAIL = 4000  # characters from the end in which the last number is looked for

_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed[ ]([^\s{}$]{1,200})")
_MARKER = re.compile(r"####|\banswer\b[ *]{0,4}(?:is\b|:|=)[: *]{0,4}", re.IGNORECASE)
_MATHS = re.compile(r"\$([^$\n]+)\$")
_NUMBER = re.compile(
    r"-?\\d?frac\{-?[\d.]+\}\{[\d.]+\}|-?\\?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:/\d+)?(?:\\?%)?"
)
_EDGES = re.compile(r"\A[\s*]+|[\s*]+\Z")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def extract_answer(text: str) -> str | None:
    """The answer that `text` gives, or None if it gives none.

    In this order: the last balanced \\boxed{...} or \\fbox{...} (None if it is empty); what follows
    the last "####", "Answer:" or "answer is" on its line; a text that is one short expression or
    phrase as it is; the last number.
    """
    box = _last_box(text)
    if box is not None:
        return box.strip() or None
    *_, marker = [None, *_MARKER.finditer(text)]
    if marker is not None:
        rest = text[marker.end() : marker.end() + TAIL].strip()
        found = _trim(rest.split("\n", 1)[0])
        if found:
            return found
    stripped = text.strip()
    short = len(stripped) <= SHORT and "\n" not in stripped
    if short and len(_WORD.findall(stripped)) <= 1:
        return stripped or None
    *_, number = [None, *_NUMBER.finditer(text[-TAIL:])]
    if number is not None:
        return number.group().rstrip(",")
    return stripped if short else None


def _last_box(text: str) -> str | None:
    """The content of the last box that is closed; of nested ones, the outermost."""
    opened: list[int] = []  # where each open group's content starts, -1 for one that is no box
    found: tuple[int, int] | None = None
    for token in _BRACES.finditer(text):
        kind = token.group()
        if kind == "}":
            start = opened.pop() if opened else -1
            if start >= 0:
                found = start, token.start()
        elif kind[-1] == "{" and len(kind) != 2:
            opened.append(token.end() if len(kind) > 2 else -1)
    if found is not None:
        return text[slice(*found)]
    *_, bare = [None, *_BARE_BOX.finditer(text)]
    return bare.group(1) if bare is not None else None


def _trim(rest: str) -> str:
    """The answer in the line after a marker: up to the sentence's end, or its only formula."""
    sentence = _EDGES.sub("", re.split(r"\.(?:\s|$)", rest, maxsplit=1)[0])
    formulas = _MATHS.findall(sentence)
    if len(formulas) == 1 and _WORD.search(_MATHS.sub("", sentence)):
        return str(formulas[0]).strip()
    return sentence


def squad_words(text: str) -> list[str]:
    """The words of `text` in lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _accepted(reference: object) -> Sequence[object]:
    return reference if isinstance(reference, list | tuple) else [reference]


def exact_match(given: str | None, reference: str | int | float | list[str]) -> bool:
    """Whether `given` has the same words as an accepted answer, as SQuAD's evaluation counts it."""
    if given is None:
        return False
    words = squad_words(given)
    return any(words == squad_words(str(one)) for one in _accepted(reference))


def f1_score(given: str | None, reference: str | int | float | list[str]) -> float:
    """F1 of the words of `given` against the accepted answer that they match best, in [0, 1]."""
    if given is None:
        return 0.0
    words = squad_words(given)
    return max((_f1(words, squad_words(str(one))) for one in _accepted(reference)), default=0.0)


def _f1(given: list[str], reference: list[str]) -> float:
    if not given or not reference:
        return float(given == reference)
    common = sum((Counter(given) & Counter(reference)).values())
    return 2 * common / (len(given) + len(reference))
