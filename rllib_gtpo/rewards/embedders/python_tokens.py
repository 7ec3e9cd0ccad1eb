"""The similarity of Python code as written: counts of its token n-grams.  Needs nothing but a CPU.

Spacing, comments, quotes and the names of variables make no difference; every literal, operator,
builtin and attribute does.  It sees what is written and not what it means: `a + b` and `b + a`
differ, and an edit that is small on the page is small here even where it makes the code wrong.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import symtable
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rllib_gtpo.encodable import encodable
from rllib_gtpo.rewards.embedders.base import check_positive

_NAME = "name"  # the one kind of token that is looked at once more
_TEXT = "text"
_DROPPED = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
_LAYOUT = {tokenize.NEWLINE: "<newline>", tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>"}
_WORD = re.compile(r"\w+|[^\w\s]")
_FIELD = re.compile(r"\{([^{}]*)\}")  # of an f-string that is one token, as before Python 3.12
_BROKEN_LINES = 16  # lines that are left out at most before bound names are given up
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)
_Token = tuple[str, str]  # kind, text


@dataclass(frozen=True)
class PythonTokens:
    """Hashed counts of the n-grams of `normalized_tokens`.

    ngrams: longest run of tokens that is counted; runs of every shorter length are, too.
    dimensions: length of a vector (4 bytes each).  Hashing makes two of thousands of n-grams meet
        now and then, which moves a similarity by about 1 / sqrt(dimensions).
    """

    ngrams: int = 3
    dimensions: int = 4096

    def __post_init__(self) -> None:
        check_positive("python_tokens", ngrams=self.ngrams, dimensions=self.dimensions)

    @property
    def identity(self) -> str:
        """See Embedder."""
        return f"python_tokens ngrams={self.ngrams} dimensions={self.dimensions}"

    def embed(self, texts: Sequence[str]) -> list[np.ndarray | Exception]:
        """See Embedder; any text has a vector."""
        if not texts:
            return []
        return list(self._vectorizer.transform([encodable(text) for text in texts]).toarray())

    @cached_property
    def _vectorizer(self) -> Any:
        from sklearn.feature_extraction.text import HashingVectorizer

        return HashingVectorizer(
            tokenizer=normalized_tokens,
            token_pattern=None,
            lowercase=False,
            ngram_range=(1, self.ngrams),
            n_features=self.dimensions,
            norm="l2",
            dtype=np.float32,
        )


def normalized_tokens(code: str) -> list[str]:
    """The code's tokens; names that it binds itself are v0, v1, ... in the order of first use.

    Kept as written are keywords, builtins, attributes, keyword arguments of functions defined
    elsewhere, and what is imported under its own name.  A name counts as one and the same in all
    scopes, and one that only one of two programs has shifts the numbers of those behind it.  What
    cannot be read as Python is taken word by word.
    """
    code = code.replace("\r\n", "\n")
    tokens = list(_tokens(code))
    bound, parameters = _bound_names(code)
    for (_, before), (kind, text) in itertools.pairwise(tokens):
        if kind == _NAME and before == "as":
            bound.add(text)
    numbers: dict[str, str] = {}
    result = []
    depth = 0
    for index, (kind, text) in enumerate(tokens):
        depth += (text in "([{") - (text in ")]}") if kind == _TEXT and len(text) == 1 else 0
        before = tokens[index - 1][1] if index else ""
        after = tokens[index + 1][1] if index + 1 < len(tokens) else ""
        argument = depth > 0 and after == "=" and text not in parameters
        if kind == _NAME and text in bound and before != "." and not argument:
            text = numbers.setdefault(text, f"v{len(numbers)}")
        result.append(text)
    while result and result[-1] in _LAYOUT.values():
        result.pop()
    return result or ["<nothing>"]


def _tokens(code: str) -> Iterator[_Token]:
    """Python's own tokens as far as they go; the rest, if there is one, in words and signs."""
    row, column = 1, 0
    try:
        for token in tokenize.generate_tokens(io.StringIO(code).readline):
            yield from _of_token(token)
            row, column = token.end
    except (tokenize.TokenError, *_NOT_PYTHON):
        rest = "\n".join(code.split("\n")[row - 1 :])[column:]
        for word in _WORD.findall(rest):
            yield (_NAME if word.isidentifier() else _TEXT), word


def _of_token(token: tokenize.TokenInfo) -> Iterator[_Token]:
    if token.type in _DROPPED or (token.type == tokenize.ERRORTOKEN and token.string.isspace()):
        return
    if token.type in _LAYOUT:
        yield _TEXT, _LAYOUT[token.type]
    elif token.type == tokenize.NAME:
        yield _NAME, token.string
    elif token.type == tokenize.STRING:
        yield from _of_string(token.string)
    else:
        yield _TEXT, token.string


def _of_string(literal: str) -> Iterator[_Token]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield _TEXT, repr(ast.literal_eval(literal))  # however it is quoted
    except _NOT_PYTHON:
        for index, part in enumerate(_FIELD.split(literal)):
            if index % 2:
                yield from ((kind, text) for kind, text in _tokens(part) if text != "<newline>")
            else:
                yield _TEXT, part


def _bound_names(code: str) -> tuple[set[str], set[str]]:
    """Names that the code binds (methods and other attributes apart), and those of parameters.

    Lines that the parser complains about are left out, so that one slip does not change the rest.
    """
    lines = code.split("\n")
    for _ in range(_BROKEN_LINES):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                return _of_scope(symtable.symtable("\n".join(lines), "code", "exec"))
        except SyntaxError as error:
            if not 1 <= (error.lineno or 0) <= len(lines):
                break
            lines[(error.lineno or 1) - 1] = ""
        except _NOT_PYTHON:
            break
    return set(), set()


def _of_scope(scope: symtable.SymbolTable) -> tuple[set[str], set[str]]:
    symbols = [] if scope.get_type() == "class" else scope.get_symbols()
    parameters = {s.get_name() for s in symbols if s.is_parameter()}
    bound = parameters | {s.get_name() for s in symbols if s.is_assigned() and not s.is_imported()}
    for child in scope.get_children():
        names, more = _of_scope(child)
        bound |= names
        parameters |= more
    return bound, parameters
