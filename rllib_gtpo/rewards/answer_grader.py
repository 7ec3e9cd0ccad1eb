"""Compares formulas with math-verify's parser and sympy; `answer` sends this file to a sandbox.

Prints one line for each pair as soon as it is decided, so that a limit that ends the process leaves
the verdicts before it.  Never import this where a formula must not hang: nothing here has a limit.

math-verify's own comparison is asked only where no number can be computed: it takes 1/2004! for
1/2006!, (2+i)^2 for unequal to 3+4i, and A for a.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import sympy  # type: ignore[import-untyped]
from latex2sympy2_extended import latex2sympy  # type: ignore[import-untyped]
from latex2sympy2_extended.latex2sympy2 import (  # type: ignore[import-untyped]
    ConversionConfig,
)
from math_verify import verify  # type: ignore[import-untyped]
from sympy.core.relational import Relational  # type: ignore[import-untyped]

DIGITS = 40  # of the numeric evaluation
PRECISE = 400  # of the second look at constants that agree
UNEVALUATED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
NEAR = sympy.Float(10) ** -20  # relative difference of values that are equal
TINY = sympy.Float(10) ** -25  # below it a sum may be the rounding error of zero
NEEDED = 2  # points at which formulas with variables must have values that can be compared
POINTS = 8
_INFINITE = (sympy.nan, sympy.zoo, sympy.oo, -sympy.oo)


def main(nonce: str, pairs: list[tuple[str, str, str]]) -> None:
    """Prints "nonce index verdict" for each (given, reference, step) in turn.

    step: How far a rounded decimal may be from the exact value; "" if neither is one.
    """
    logging.disable(logging.CRITICAL)
    sys.setrecursionlimit(2000)
    for index, (given, reference, step) in enumerate(pairs):
        try:
            verdict = str(compare(read(given), read(reference), step))
        except Exception:
            verdict = "None"
        print(nonce, index, verdict, flush=True)


def read(text: str) -> Any:
    """The formula; raises whatever the parser raises."""
    config = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)
    formula = latex2sympy(text, normalization_config=None, conversion_config=config)
    if not isinstance(formula, sympy.Basic):
        return formula
    constants: dict[Any, Any] = {sympy.Symbol(e): sympy.E for e in "eE"}
    if not formula.has(sympy.Sum, sympy.Product):
        constants[sympy.Symbol("i")] = sympy.I
    constants |= {f: sympy.Rational(str(f)) for f in formula.atoms(sympy.Float)}
    return formula.xreplace(constants)


def compare(a: Any, b: Any, step: str = "") -> bool | None:
    """Whether two formulas are equal; None if that cannot be told."""
    if a == b:
        return True
    matrices = [isinstance(x, sympy.MatrixBase) for x in (a, b)]
    if all(matrices):
        return a.shape == b.shape and all(compare(x, y) for x, y in zip(a, b, strict=True))
    relations = [isinstance(x, Relational) for x in (a, b)]
    if all(relations):
        return same_relation(a, b)
    if any(relations) or any(matrices):
        return False
    if isinstance(a, sympy.Expr) and isinstance(b, sympy.Expr):
        verdict = same_values(a, b, step)
        if verdict is not None:
            return verdict
    return bool(verify(b, a, timeout_seconds=None))


def same_values(a: Any, b: Any, step: str) -> bool | None:
    """Compare numbers as numbers, and formulas with variables at several points."""
    names = sorted((a.free_symbols | b.free_symbols), key=str)
    if not names:
        x, y = value(a, {}), value(b, {})
        if x is None or y is None:
            return None
        if step and abs(x - y) < sympy.Rational(step):
            return True
        if not near(x, y, a, b) or a.has(*UNEVALUATED) or b.has(*UNEVALUATED):
            return near(x, y, a, b)
        x, y = value(a, {}, PRECISE), value(b, {}, PRECISE)  # 10^100 is not 10^100+1
        size = max(abs(x), abs(y))
        return size < TINY or bool(abs(x - y) <= size * sympy.Float(10, PRECISE) ** (40 - PRECISE))
    real: list[bool] = []
    other: list[bool] = []
    for point in points(names):
        x, y = value(a, point), value(b, point)
        if x is None or y is None:
            continue
        (real if x.is_real and y.is_real else other).append(near(x, y, a, b))
    decided = real if len(real) >= NEEDED else other
    return all(decided) if len(decided) >= NEEDED else None


def points(names: list[Any]) -> list[dict[Any, Any]]:
    """Values for the variables: three positive points, three of mixed signs, two of integers."""
    table = []
    for j in range(POINTS):
        top = [17 + 13 * j + 29 * k + 7 * k * k for k in range(len(names))]
        if j < 3:
            values = [sympy.Rational(t, 23 + 8 * j) for t in top]
        elif j < 6:
            values = [sympy.Rational(-t if (k + j) % 2 else t, 41) for k, t in enumerate(top)]
        else:
            values = [sympy.Integer(3 + j % 2 + 2 * k) for k in range(len(names))]
        table.append(dict(zip(names, values, strict=True)))
    return table


def value(formula: Any, point: dict[Any, Any], digits: int = DIGITS) -> Any:
    """The formula's finite value at the point, or None."""
    for prepare in (lambda f: f, lambda f: f.doit()):
        try:
            number = sympy.N(prepare(formula.subs(point)), digits)
        except (ValueError, TypeError, NotImplementedError, ArithmeticError):
            continue
        infinite = number.is_finite is False or number.has(*_INFINITE)
        if number.is_number and not infinite:
            real, imaginary = number.as_real_imag()
            small = abs(imaginary) <= TINY * max(1, abs(real))
            return real if small else real + sympy.I * imaginary
    return None


def near(x: Any, y: Any, a: Any, b: Any) -> bool:
    """Whether values agree; differences that may be rounding errors of zero are simplified."""
    size = max(abs(x), abs(y))
    if size < TINY and (x == 0 or y == 0 or a.has(sympy.Add) or b.has(sympy.Add)):
        return bool(sympy.simplify(a - b) == 0)
    return bool(abs(x - y) <= NEAR * size)


def same_relation(a: Any, b: Any) -> bool | None:
    """Whether one equation or inequality is a multiple of the other."""
    flip = {sympy.Gt: sympy.Lt, sympy.Ge: sympy.Le, sympy.Lt: sympy.Gt, sympy.Le: sympy.Ge}
    p, q = a.lhs - a.rhs, b.lhs - b.rhs
    ratios = []
    for point in points(sorted(p.free_symbols | q.free_symbols, key=str)):
        x, y = value(p, point), value(q, point)
        if x is not None and y is not None and x.is_real and y.is_real and y != 0:
            ratios.append(x / y)
    if len(ratios) < NEEDED or ratios[0] == 0:
        return None
    if any(abs(r - ratios[0]) > NEAR * abs(ratios[0]) for r in ratios):
        return False
    if type(a) is type(b):
        return type(a) in (sympy.Eq, sympy.Ne) or bool(ratios[0] > 0)
    return flip.get(type(a)) is type(b) and bool(ratios[0] < 0)
