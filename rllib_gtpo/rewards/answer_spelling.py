"""One spelling for the many ways to write a mathematical answer, and exact numbers.

`spell` maps LaTeX and plain text to a compact LaTeX.  In it `;` separates what a writer separated
with a comma and a space, so that `1,000` and `1, 000` stay different; `¤` is the dollar and `°` the
degree.  Everything here takes time linear in texts of at most `MAX_CHARS`.
"""

from __future__ import annotations

# ruff: noqa: RUF001  (characters that look alike are what this file is about)
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 4000  # longer answers are compared literally
ROUNDED_DIGITS = 6  # significant digits from which a decimal may stand for the exact value

_SYMBOLS = {
    **{c: f"^{{{i}}}" for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{c: f"_{{{i}}}" for i, c in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{"½": r"\frac{1}{2}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{"⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}"},
    **dict.fromkeys("−–—‐‑", "-"),
    **dict.fromkeys("×·⋅∗", "*"),
    **dict.fromkeys("“”„", '"'),
    **dict.fromkeys("‘’", "'"),
    **dict.fromkeys("÷∕⁄", "/"),
    **{"√": r"\sqrt ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta "},
    **{"α": r"\alpha ", "β": r"\beta ", "λ": r"\lambda ", "±": r"\pm ", "∓": r"\mp ", "≈": "="},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in "},
    **{"∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "º": "°", "…": "..."},
}
_SYMBOL = str.maketrans(_SYMBOLS)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_DROP = _words(
    "left right mleft mright bigl bigr Bigl Bigr biggl biggr big Big bigg Bigg displaystyle "
    "textstyle limits nolimits rm bf it boldsymbol"
)
_UNWRAP = _words(
    "text textbf textit textrm textsf texttt textnormal mathrm mathbf mathit mathsf mbox hbox "
    "operatorname boxed fbox emph bm"
)
_RENAME = {
    **dict.fromkeys(("dfrac", "tfrac", "cfrac"), r"\frac"),
    **dict.fromkeys(("leq", "leqslant"), r"\le "),
    **dict.fromkeys(("geq", "geqslant"), r"\ge "),
    **dict.fromkeys(("times", "cdot"), "*"),
    **dict.fromkeys(("quad", "qquad", "space", "enspace", "thinspace"), " "),
    **dict.fromkeys(("varnothing", "O"), r"\emptyset "),
    **dict.fromkeys(("degree", "degrees"), "°"),
    **dict.fromkeys(("land", "wedge"), " and "),
    **dict.fromkeys(("lor", "vee"), " or "),
    **dict.fromkeys(("dots", "cdots", "ldots"), r"\ldots "),
    **{"lt": "<", "gt": ">", "neq": r"\ne ", "approx": "=", "div": "/", "lbrace": r"\{"},
    **{"rbrace": r"\}", "langle": "(", "rangle": ")", "lbrack": "[", "rbrack": "]"},
    **{"imath": "i", "mathbbR": r"\mathbb{R}", "euro": "€", "pounds": "£", "percent": "%"},
}
_FUNCTIONS = _words(
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp sqrt pi theta alpha "
    "beta lambda infinity infty inf"
)
_ESCAPES = {**{"\\" + c: " " for c in ",;: >~"}, r"\!": "", r"\%": "%"}
_ESCAPES |= {r"\$": "¤", r"\(": "", r"\)": "", r"\[": "", r"\]": "", r"\&": "&"}
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[{}]|[^\\{}]+|\\", re.DOTALL)
_WRAPPERS = (
    *(("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")),
    *(("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'")),
)
_REWRITES: list[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]] = [
    (re.compile(rf"(?<![\\A-Za-z])({'|'.join(_FUNCTIONS)})(?![A-Za-z])"), r"\\\1 "),
    (re.compile(r"\\(?:infinity|inf)(?![A-Za-z])"), r"\\infty "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\begin\{[bvp]?matrix\}"), lambda m: m.group().replace("bmatrix", "pmatrix")),
    (re.compile(r",\s+"), ";"),
    (re.compile(r"\s+"), " "),
    (re.compile(r"\^ ?(?:\{ ?\\circ ?\}|\\circ(?![A-Za-z]))"), "°"),
    (re.compile(r"(?<=[\d}]) ?deg(?:rees?)?(?![A-Za-z])"), "°"),
    (re.compile(r" ?\b(?:percent(?:age)?|per cent|pct)\b", re.IGNORECASE), "%"),
    (re.compile(r"\b([ap])\.m\b\.?", re.IGNORECASE), r"\1m"),
    (re.compile(r"<="), r"\\le "),
    (re.compile(r">="), r"\\ge "),
    (re.compile(r"!="), r"\\ne "),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r" ?([^\w\s\\.}\)\]]) ?| (?=[\\}\)\].])"), r"\1"),
    (re.compile(r"(?<=[}\)\].]) (?![A-Za-z\d])"), ""),
    (re.compile(r"\\frac ?(\w)"), r"\\frac{\1}"),
    (re.compile(r"(\\frac\{[^{}]*\}) ?(\w)"), r"\1{\2}"),
    (re.compile(r"\\sqrt ?(\w)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt ?\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\^\(([^()]*)\)"), r"^{\1}"),
    (re.compile(r"([\^_])(-?\d+|\w)"), r"\1{\2}"),
    (re.compile(r"(\\[A-Za-z]+) (?![A-Za-z])"), r"\1"),
    (re.compile(r"(?<![\w.}^)/])(\d+)/(\d+)(?![\d.!^/])"), r"\\frac{\1}{\2}"),  # 1/2x is x/2
]


def spell(text: str) -> str:
    """The compact spelling of `text`, which must have at most MAX_CHARS characters."""
    text = text.translate(_SYMBOL)
    composed = unicodedata.normalize("NFKC", text).translate(_SYMBOL)
    if len(composed) <= MAX_CHARS:  # one character may become eighteen
        text = composed
    text = _unwrap(text.replace("\0", ""))
    text = _currency(_commands(text))
    for pattern, new in _REWRITES:
        text = pattern.sub(new, text)
    return _strip_end(text)


def _strip_end(text: str) -> str:
    text = text.strip()
    while text and text[-1] in ".,;:" and not text.endswith(".."):
        text = text[:-1].rstrip()
    return text


def _unwrap(text: str) -> str:
    """Take off what encloses the whole text: dollars, bold, quotes, a full stop."""
    for _ in range(8):
        text = _strip_end(text)
        for left, right in _WRAPPERS:
            inner = text[len(left) : len(text) - len(right)]
            if text.startswith(left) and text.endswith(right) and inner and left not in inner:
                text = inner
                break
        else:
            break
    return text


def _commands(text: str) -> str:
    """Rewrite LaTeX commands one by one; `\\text{...}` and its like leave their content."""
    out: list[str] = []
    kept: list[bool] = []  # for each open brace, whether it is written
    unwrap = False
    for token in _TOKEN.findall(text):
        if token == "{":
            kept.append(not unwrap)
            out.append(" " if unwrap else "{")
        elif token == "}":
            out.append("}" if not kept or kept.pop() else " ")
        elif token[0] != "\\":
            out.append(token)
            if token.isspace():
                continue
        elif (name := token[1:]) in _UNWRAP:
            out.append(" ")
            unwrap = True
            continue
        elif name not in _DROP:
            out.append(_RENAME.get(name, _ESCAPES.get(token, token)))
        unwrap = False
    return "".join(out)


def _currency(text: str) -> str:
    """Tell a dollar of money, before a digit and unpaired, from one that encloses a formula."""
    signs = [i for i, c in enumerate(text) if c == "$"]
    money = all(text[i + 1 : i + 2].isdigit() for i in signs)
    return text.replace("$", "¤" if money else " ")


@dataclass(frozen=True)
class Number:
    """An exact value.  `step` is the last decimal place of a decimal that may be rounded."""

    value: Fraction
    step: Fraction | None = None

    def equals(self, other: Number) -> bool:
        """Equal, or one is the other rounded or cut to at least ROUNDED_DIGITS digits."""
        gap = abs(self.value - other.value)
        return gap == 0 or any(n.step is not None and gap < n.step for n in (self, other))


_WHOLE = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_DECIMAL = rf"(?:(?:{_WHOLE})(?:\.\d*)?|\.\d+)"
_POWER = r"(?:[eE]([+-]?\d{1,4})|\*10\^\{([+-]?\d{1,4})\})"
_PLAIN = re.compile(rf"([+-]?)(?:({_DECIMAL}){_POWER}?|10\^\{{([+-]?\d{{1,4}})\}})", re.ASCII)
_SIGNED = rf"[+-]?{_DECIMAL}"
_RATIO = re.compile(
    rf"([+-]?)(?:\\frac\{{({_SIGNED})\}}\{{({_SIGNED})\}}"
    rf"|\(?({_SIGNED})\)?/\(?({_SIGNED})\)?)",
    re.ASCII,
)
_MIXED = re.compile(r"([+-]?)(\d+)(?: ?\\frac\{(\d+)\}\{(\d+)\}| (\d+)/(\d+))", re.ASCII)
_REPEATING = re.compile(r"([+-]?)(\d*)\.(\d*)\\overline\{(\d+)\}", re.ASCII)


def number(text: str) -> Number | None:
    """The number that the spelled `text` is, or None: decimals, fractions, mixed numbers."""
    while len(text) > 2 and text[0] + text[-1] in ("()", "{}") and text[0] not in text[1:-1]:
        text = text[1:-1]
    for pattern, read in _READERS:
        if match := pattern.fullmatch(text):
            return read(*match.groups())
    return None


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(",", "").replace(" ", "").rstrip("."))


def _plain(
    sign: str, digits: str | None, e: str | None, times: str | None, power: str | None
) -> Number:
    scale = Fraction(10) ** int(e or times or power or 0)
    digits = (digits or "1").replace(",", "").replace(" ", "")
    value = _fraction(digits) * scale
    _, _, decimals = digits.partition(".")
    exact = not decimals or len(digits.replace(".", "").lstrip("0")) < ROUNDED_DIGITS
    step = None if exact else scale / 10 ** len(decimals)
    return Number(-value if sign == "-" else value, step)


def _ratio(sign: str, *parts: str | None) -> Number | None:
    top, bottom = (_fraction(part) for part in parts if part is not None)
    return Number((-top if sign == "-" else top) / bottom) if bottom else None


def _mixed(sign: str, whole: str, *parts: str | None) -> Number | None:
    top, bottom = (int(part) for part in parts if part is not None)
    value = int(whole) + Fraction(top, bottom or 1)
    return Number(-value if sign == "-" else value) if 0 < top < bottom else None


def _repeating(sign: str, whole: str, fixed: str, cycle: str) -> Number:
    tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
    value = Fraction(int(whole + fixed or "0"), 10 ** len(fixed)) + tail
    return Number(-value if sign == "-" else value)


_READERS: list[tuple[re.Pattern[str], Callable[..., Number | None]]] = [
    (_PLAIN, _plain),
    (_RATIO, _ratio),
    (_MIXED, _mixed),
    (_REPEATING, _repeating),
]
