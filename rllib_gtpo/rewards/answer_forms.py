"""The structure of mathematical answers: lists, tuples, intervals, sets, matrices, named values.

`parse` reads a spelled answer, `same` compares two.  What neither decides are single formulas:
they go to a function `leaf(given, reference) -> bool`.  Every element is compared even where one
is known to differ, so that a first pass with a `leaf` that says yes meets all formulas there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

from rllib_gtpo.rewards.answer_spelling import Number, number
from rllib_gtpo.rewards.answer_units import (
    NO_SOLUTION,
    date_of,
    is_prose,
    split_unit,
    words_of,
)

MAX_DEPTH = 12
MAX_ITEMS = 40
MAX_WORDS = 4  # of an element of a list; more make a sentence
Leaf = Callable[[str, str], bool]


@dataclass(frozen=True)
class Formula:
    """A number, an expression, or words."""

    text: str


@dataclass(frozen=True)
class Named:
    """`name=value`; the name is "" where the value alone counts."""

    name: str
    value: Form
    text: str


@dataclass(frozen=True)
class Group:
    """Several forms.

    kind: "list" (no brackets), "set", "union", "matrix" (its items are rows), "row", "column", or
        the two brackets of a tuple or interval, such as "[)".
    """

    kind: str
    items: tuple[Form, ...]


Form = Formula | Named | Group

_SPLIT_WORD = re.compile(r"(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])")
_NAME = re.compile(r"(?:[^\d+\-*/^=<>;!_]|_\{\w+\}){1,40}")
_VARIABLE = r"(?:[A-Za-z]|\\[a-z]+)(?:_\{\w+\})?"
_BELOW, _ABOVE = r"(?:<|\\le(?![a-z])) ?", r"(?:>|\\ge(?![a-z])) ?"
_SIDE = r"[^<>=\\]*(?:\\(?!(?:le|ge|ne)(?![a-z]))[^<>=\\]*)*"  # a formula without relations
_INEQUALITIES = [
    (re.compile(rf"({_SIDE})({_BELOW})({_VARIABLE})({_BELOW})({_SIDE})"), "between"),
    (re.compile(rf"({_SIDE})({_ABOVE})({_VARIABLE})({_ABOVE})({_SIDE})"), "between"),
    (re.compile(rf"({_VARIABLE})({_BELOW}|{_ABOVE})({_SIDE})"), "right"),
    (re.compile(rf"({_SIDE})({_BELOW}|{_ABOVE})({_VARIABLE})"), "left"),
]
_MEMBER = re.compile(rf"({_VARIABLE})\\in ?(.+)")
_MATRIX = re.compile(r"\\begin\{(?:p?matrix|array)\}(?:\{[clr|]*\})?(.*?)(?:\\\\)?\\end\{\w+\}")
_OUTSIDE_IN = re.compile(r"\]([^\[\]]+)\[")
_PADDED = re.compile(r"-?\d{1,3}(?:,\d{3})*,0\d\d(?:,\d{3})*", re.ASCII)
_BASE = re.compile(r"([0-9A-Fa-f]+)_\{(\d+)\}")
_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?|[A-Za-z])°")
_RATIO = re.compile(r"(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)", re.ASCII)
_LITERAL = re.compile(r"\\ldots|\.\.\.|\d\.\d*\.|\d \d")  # "1, 2, ...", 1.2.3, "1 2": no formulas
_OPEN, _CLOSE = "([{", ")]}"


def parse(text: str, depth: int = 0) -> Form:
    """The structure of a spelled answer."""
    if depth > MAX_DEPTH:
        return Formula(text)
    if (date := date_of(text)) is not None:
        return Formula(date)
    if NO_SOLUTION.fullmatch(text):
        return Formula(r"\emptyset")
    if text in (r"\mathbb{R}", "all real numbers", r"x\in\mathbb{R}"):
        text = r"(-\infty,\infty)"
    if number(split_unit(text)[0]) is not None:
        return Formula(text)
    for read in (_read_list, _read_signs, _read_named, _read_union, _read_brackets, _read_matrix):
        form = read(text, depth + 1)
        if form is not None:
            return form
    return Formula(text)


def _cut(text: str, is_cut: Callable[[str, int], int]) -> list[str]:
    """`text` cut at its top level, where `is_cut(text, i)` is the length of a separator."""
    parts, level, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in _OPEN:
            level += 1
        elif text[i] in _CLOSE:
            level -= 1
        elif level == 0 and (size := is_cut(text, i)):
            parts.append(text[start:i])
            start = i + size
            i = start
            continue
        i += 1
    return [*parts, text[start:]]


def _word(text: str, i: int) -> int:
    match = _SPLIT_WORD.match(text, i)
    return match.end() - i if match else 0


def _items(text: str, in_brackets: bool) -> list[str]:
    """The elements of a list: after "; ", "and" and "or", and after commas of no thousands."""
    parts = []
    coarse = _cut(text, lambda t, i: int(t[i] == ";") or _word(t, i))
    for part in coarse:
        part = part.strip()
        if (len(coarse) > 1 or not in_brackets) and number(split_unit(part)[0]) is not None:
            parts.append(part)
        else:
            parts += (p.strip() for p in _cut(part, lambda t, i: int(t[i] == ",")))
    return [p for p in parts if p] if len(parts) > 1 else parts


def _read_list(text: str, depth: int) -> Form | None:
    parts = _items(text, in_brackets=False)
    if len(parts) < 2 or any(len(part.split()) > MAX_WORDS for part in parts):
        return None  # one thing, or a sentence
    items: list[Form] = []
    for part in parts:
        form = parse(part, depth)
        items += form.items if isinstance(form, Group) and form.kind == "list" else (form,)
    first = items[0]
    if isinstance(first, Named) and all(
        not isinstance(f, Named) or f.name == first.name for f in items
    ):
        values = tuple(f.value if isinstance(f, Named) else f for f in items)
        return Named(first.name, Group("list", values), text)
    return Group("list", tuple(items))


def _read_signs(text: str, depth: int) -> Form | None:
    """`a\\pm b` is the list of both."""
    if r"\pm" not in text and r"\mp" not in text:
        return None
    both = []
    for plus, minus in (("+", "-"), ("-", "+")):
        signed = text.replace(r"\pm", plus).replace(r"\mp", minus)
        both.append(parse(re.sub(r"(^|[=(;,])\+", r"\1", signed).replace("+ ", "+"), depth))
    first, second = both
    if isinstance(first, Named) and isinstance(second, Named) and first.name == second.name:
        return Named(first.name, Group("list", (first.value, second.value)), text)
    return Group("list", (first, second))


def _read_named(text: str, depth: int) -> Form | None:
    for pattern, order in _INEQUALITIES:
        if match := pattern.fullmatch(text):
            return _interval(match, order, text, depth)
    if match := _MEMBER.fullmatch(text):
        return Named(match.group(1), parse(match.group(2), depth), text)
    sides = _cut(text, lambda t, i: int(t[i] == "=" and t[i - 1 : i] not in ("<", ">", "!", "\\")))
    if len(sides) < 2 or not sides[-1].strip():
        return None
    name, value = sides[0].strip(), sides[-1].strip()
    if name and _NAME.fullmatch(name) is None:
        return None
    return Named("" if is_prose(name) else name, parse(value, depth), text)


def _interval(match: re.Match[str], order: str, text: str, depth: int) -> Form:
    low, high, name, signs = r"-\infty", r"\infty", "", []
    if order == "between":
        low, first, name, second, high = match.groups()
        signs = [first.strip(), second.strip()]
        if signs[0] in (">", r"\ge"):
            low, high, signs = high, low, signs[::-1]
    else:
        name, sign, bound = match.groups() if order == "right" else match.groups()[::-1]
        sign = sign.strip()
        if (sign in ("<", r"\le")) == (order == "right"):
            high, signs = bound, ["<", sign]
        else:
            low, signs = bound, [sign, "<"]
    left, right = ("(" if s in "<>" else "[" for s in signs)
    ends = (parse(low.strip(), depth), parse(high.strip(), depth))
    return Named(name, Group(left + (")" if right == "(" else "]"), ends), text)


def _read_union(text: str, depth: int) -> Form | None:
    parts = _cut(text, lambda t, i: 4 if t.startswith(r"\cup", i) else 0)
    if len(parts) < 2:
        return None
    return Group("union", tuple(parse(p.strip(), depth) for p in parts))


def _read_brackets(text: str, depth: int) -> Form | None:
    kind = text[:1] + text[-1:]
    if match := _OUTSIDE_IN.fullmatch(text):  # ]1,2[
        kind, inner = "()", match.group(1)
    elif text.startswith(r"\{") and text.endswith(r"\}") and _closes_at_end(text[1:-2] + "}"):
        kind, inner = "set", text[2:-2]
    elif len(text) > 1 and text[0] in _OPEN and text[-1] in _CLOSE and _closes_at_end(text):
        inner = text[1:-1]
        kind = "set" if kind == "{}" else kind
    else:
        return None
    if r"\mid" in inner or (kind == "set" and (":" in inner or "|" in inner)):
        return None
    if not inner.strip():
        return Formula(r"\emptyset") if kind == "set" else None
    parts = [inner] if _PADDED.fullmatch(inner) else _items(inner, in_brackets=True)
    if kind == "set":
        return Group("set", _flat(parts, depth))
    if len(parts) < 2:
        return parse(inner, depth) if kind == "()" else Group(kind, (parse(inner, depth),))
    return Group(kind, tuple(parse(p, depth) for p in parts))


def _flat(parts: list[str], depth: int) -> tuple[Form, ...]:
    items: list[Form] = []
    for form in (parse(p, depth) for p in parts):
        items += form.items if isinstance(form, Group) and form.kind == "list" else (form,)
    return tuple(items)


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens `text` is closed by its last character."""
    level = 0
    for i, c in enumerate(text):
        level += (c in _OPEN) - (c in _CLOSE)
        if level == 0:
            return i == len(text) - 1
    return False


def _read_matrix(text: str, depth: int) -> Form | None:
    match = _MATRIX.fullmatch(text)
    if match is None or r"\begin" in match.group(1):
        return None
    rows = [
        tuple(parse(cell.strip(), depth) for cell in row.split("&"))
        for row in match.group(1).split(r"\\")
    ]
    if len({len(row) for row in rows}) > 1:
        return None
    if len(rows) == 1:
        return Group("row", rows[0])
    if len(rows[0]) == 1:
        return Group("column", tuple(row[0] for row in rows))
    return Group("matrix", tuple(Group("row", row) for row in rows))


def same(a: Form, b: Form, leaf: Leaf) -> bool:
    """Whether the forms mean the same, given what `leaf` says of their formulas."""
    if isinstance(a, Named) and isinstance(b, Named) and a.name and b.name and a.name != b.name:
        if any(isinstance(f.value, Formula) and number(f.value.text) for f in (a, b)):
            return False
        return leaf(a.text, b.text)
    if isinstance(a, Named) and not isinstance(b, Named):
        return _same_named(a, b, leaf)
    if isinstance(b, Named) and not isinstance(a, Named):
        return _same_named(b, a, lambda x, y: leaf(y, x))
    if isinstance(a, Named) and isinstance(b, Named):
        return same(a.value, b.value, leaf)
    if isinstance(a, Formula) and isinstance(b, Formula):
        return same_formula(a.text, b.text, leaf)
    if isinstance(a, Formula) or isinstance(b, Formula):
        group, single = (a, b) if isinstance(a, Group) else (b, a)
        assert isinstance(group, Group)
        return (
            group.kind in ("set", "[]")
            and len(group.items) == 1
            and group.items[0] != Formula(r"\emptyset")
            and same(group.items[0], single, leaf)
        )
    assert isinstance(a, Group) and isinstance(b, Group)
    return _same_group(a, b, leaf)


def _same_named(a: Named, b: Form, leaf: Leaf) -> bool:
    if isinstance(b, Formula) and "=" in b.text:
        return leaf(a.text, b.text)
    return same(a.value, b, leaf)


def _same_group(a: Group, b: Group, leaf: Leaf) -> bool:
    kinds = {a.kind, b.kind}
    if len(a.items) > MAX_ITEMS or len(b.items) > MAX_ITEMS:
        return False
    if kinds <= {"set", "list"} or kinds == {"union"}:
        return _same_unordered(a, b, leaf)
    vectors = {"row", "column"}
    round_or_bare = kinds <= {"()", "[]", "list"} and "list" in kinds
    if len(kinds) > 1 and not round_or_bare and not (kinds & vectors and kinds <= vectors | {"()"}):
        return False
    if kinds == vectors or len(a.items) != len(b.items):
        return False
    return all([same(x, y, leaf) for x, y in zip(a.items, b.items, strict=True)])


def _same_unordered(a: Group, b: Group, leaf: Leaf) -> bool:
    """Each element has its partner; in two sets repeated elements count once."""
    table = [[same(x, y, leaf) for y in b.items] for x in a.items]
    if a.kind == b.kind == "set":
        return all(any(row) for row in table) and all(
            any(column) for column in zip(*table, strict=True)
        )
    if len(a.items) != len(b.items):
        return False
    partner: dict[int, int] = {}

    def place(row: int, seen: set[int]) -> bool:
        for column, equal in enumerate(table[row]):
            if equal and column not in seen:
                seen.add(column)
                if column not in partner or place(partner[column], seen):
                    partner[column] = row
                    return True
        return False

    return all(place(row, set()) for row in range(len(table)))


def same_formula(a: str, b: str, leaf: Leaf) -> bool:
    """Whether two formulas, numbers with units, or words are the same."""
    if a == b:
        return True
    bases = [_BASE.fullmatch(t) for t in (a, b)]
    if any(bases):  # a missing base is understood, as a missing unit is
        digits = {m[1].lower() if m else t.lower() for m, t in zip(bases, (a, b), strict=True)}
        return len(digits) == 1 and len({m[2] for m in bases if m}) == 1
    (value_a, unit_a), (value_b, unit_b) = split_unit(a), split_unit(b)
    if unit_a and unit_b and unit_a != unit_b:
        return False
    x, y = number(value_a), number(value_b)
    if x is not None and y is not None:
        if x.equals(y):
            return True
        hundredth = [replace(n, value=n.value / 100, step=n.step and n.step / 100) for n in (x, y)]
        return (unit_a == "%" and not unit_b and hundredth[0].equals(y)) or (
            unit_b == "%" and not unit_a and hundredth[1].equals(x)
        )
    ratios = [_RATIO.fullmatch(t) for t in (value_a, value_b)]
    if any(ratios):
        return _same_ratio(ratios[0] or x, ratios[1] or y)
    if is_prose(value_a) or is_prose(value_b):
        return words_of(a) == words_of(b)
    if _LITERAL.search(a) or _LITERAL.search(b):
        return False
    if "°" in (unit_a, unit_b) and unit_a != unit_b:
        value_a, value_b = (
            rf"\frac{{({v})*\pi}}{{180}}" if u == "°" else v
            for v, u in ((value_a, unit_a), (value_b, unit_b))
        )
    value_a, value_b = (_DEGREES.sub(r"\\frac{\1*\\pi}{180}", v) for v in (value_a, value_b))
    return value_a == value_b or leaf(value_a, value_b)


def _same_ratio(a: re.Match[str] | Number | None, b: re.Match[str] | Number | None) -> bool:
    """3:4 is 3:4 and 3/4; two ratios or times of day must agree in both parts."""
    if isinstance(a, re.Match) and isinstance(b, re.Match):
        return [Fraction(g) for g in a.groups()] == [Fraction(g) for g in b.groups()]
    x, y = (number(f"{n[1]}/{n[2]}") if isinstance(n, re.Match) else n for n in (a, b))
    return x is not None and y is not None and x.value == y.value
