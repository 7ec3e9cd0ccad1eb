"""Words, units, dates and option letters of answers that `answer_spelling.spell` has spelled."""

from __future__ import annotations

import re

from rllib_gtpo.rewards.answer_spelling import number
from rllib_gtpo.rewards.answer_text import squad_words

_UNITS = {
    "cm": "centimeter centimetre", "mm": "millimeter millimetre", "m": "meter metre",
    "km": "kilometer kilometre", "in": "inch inches", "ft": "foot feet", "yd": "yard", "mi": "mile",
    "kg": "kilogram kgs", "g": "gram", "mg": "milligram", "lb": "pound lbs", "oz": "ounce",
    "l": "liter litre L", "ml": "milliliter millilitre mL", "s": "second sec secs",
    "min": "minute mins", "h": "hour hr hrs", "ms": "millisecond", "mph": "", "kph": "kmh",
    "j": "joule J", "kj": "kilojoule kJ", "n": "newton N", "w": "watt W", "kw": "kilowatt kW",
    "v": "volt V", "k": "kelvin K", "pa": "pascal Pa", "kpa": "kPa", "hz": "hertz Hz",
    "mol": "mole", "°": "degree deg", "rad": "radian", "¤": "dollar usd USD buck", "€": "euro EUR",
    "£": "GBP", "cent": "¢", "am": "", "pm": "", "%": "", "sq": "square", "cu": "cubic",
}  # fmt: skip
_ALIAS = {a: unit for unit, names in _UNITS.items() for a in (unit, *names.split())}
_SCALE = {"dozen": 12, "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_GLUE = ("per", "of", "in", "a", "an", "each", "the")
MAX_WORDS = 16  # of a unit; the search for its begin takes time quadratic in them
_UNIT = re.compile(r"([A-Za-z]+|[°%¢€£¤])(?:\^\{(-?\d)\}|([23]))?")
_ATTACHED = re.compile(r"(.*[\d}\)])((?:[A-Za-z]{2,}|[°%¢€£])[A-Za-z/*^{}\d]*)", re.DOTALL)
_CONSTANT = re.compile(r"(?:\\(?:sqrt|frac|pi)|[\d{}()\[\]+\-*/.,:^ !])+", re.ASCII)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_OPERATIONS = ("not", "and", "or", "but", "less", "more", "than", "minus", "plus", "times", "over")
_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = rf"({'|'.join(_MONTHS)})[a-z]*\.?"
_DATES = (
    re.compile(rf"{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?(?:[;, ]+(\d{{4}}))?", re.IGNORECASE),
    re.compile(rf"(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:[;, ]+(\d{{4}}))?", re.IGNORECASE),
    re.compile(r"(\d{4})-(\d{2})-(\d{2})"),
)
_LETTER = re.compile(
    r"(?:(?:the )?(?:correct )?(?:option|choice|answer) ?(?:is|:)? ?)?"
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])(?=[).:\]]|$))",
    re.IGNORECASE,
)
_MORE_LETTERS = re.compile(r"[).:\]]? ?(?:and\b|or\b|[,;&/+])", re.IGNORECASE)
NO_SOLUTION = re.compile(
    r"(?:there (?:is|are) )?no (?:real |valid |such |integer )?(?:solutions?|roots?|values?)"
    r"(?: exists?)?|(?:the )?empty set|\\emptyset|\\\{\\\}",
    re.IGNORECASE,
)


def unit_of(text: str) -> str | None:
    """One name for a unit or counted noun however it is written; None if `text` is neither."""
    names: list[str] = []
    power = ""
    for part in re.split(r" per |/", text):
        for word in part.replace("*", " ").split():
            match = _UNIT.fullmatch(word)
            if match is None:
                return None
            name = match.group(1)
            known = (
                _ALIAS.get(name)
                or _ALIAS.get(name.lower())
                or _ALIAS.get(name.lower().removesuffix("s"))
            )
            if known is None and name.lower() in _GLUE:
                continue
            if known is None and (len(name) < 3 or name.lower() in _OPERATIONS):
                return None
            if known in ("sq", "cu"):
                power = "2" if known == "sq" else "3"
                continue
            exponent, power = match.group(2) or match.group(3) or power, ""
            names.append((known or name.lower().removesuffix("s")) + exponent)
        names.append("/")
    while names and names[-1] == "/":
        names.pop()
    return " ".join(names) or None


def split_unit(text: str) -> tuple[str, str]:
    """The quantity and the unit of `text`, "" if it has none.  Scale words multiply."""
    if _ANGLE_FUNCTION.search(text):  # its degree belongs to its argument
        return text, ""
    sign = "-" if text[:1] == "-" else ""
    if text[len(sign) : len(sign) + 1] in ("¤", "€", "£"):
        return sign + text[len(sign) + 1 :], text[len(sign)]
    words = text.split(" ")
    count = len(words)
    least = max(1, count - MAX_WORDS)
    while count > least and unit_of(" ".join(words[count - 1 :])) is not None:
        count -= 1
    value, unit = " ".join(words[:count]), " ".join(words[count:])
    match = _ATTACHED.fullmatch(value)
    if match is not None and (len(match.group(2)) > 3 or match.group(2) in _ALIAS):
        joined = f"{match.group(2)} {unit}".strip()
        if unit_of(joined) is not None:
            value, unit = match.group(1), joined
    if not unit or _CONSTANT.fullmatch(value) is None:
        return text, ""
    first, _, rest = unit.partition(" ")
    if first in _SCALE and (plain := number(value)) is not None:
        return str(plain.value * _SCALE[first]), unit_of(rest) or ""
    return value, unit_of(unit) or ""


def is_prose(text: str) -> bool:
    """Whether the spelled `text` is words rather than a formula."""
    bare = re.sub(r"\\[A-Za-z]+", " ", text)
    longest = max((len(w) for w in re.findall(r"[A-Za-zÀ-￿]+", bare)), default=0)
    pure = re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ '.;:!?-])*", text) is not None
    return longest >= 4 or (longest >= 3 and pure) or bool(re.search(r"[^\x00-\x7f°¤€£¢]", bare))


def words_of(text: str) -> list[str]:
    """The words that prose is compared by."""
    return squad_words(text.replace("\\", " ")) or [text]


def date_of(text: str) -> str | None:
    """A date with its month's name, or in ISO form, as year-month-day; None for anything else."""
    for order, pattern in enumerate(_DATES):
        match = pattern.fullmatch(text)
        if match is None:
            continue
        if order == 2:
            year, month, day = (int(g) for g in match.groups())
        else:
            name, day_text = match.group(1 + order), match.group(2 - order)
            month, day = _MONTHS.index(name[:3].lower()) + 1, int(day_text)
            year = int(match.group(3) or 0)
        return f"date {year}-{month}-{day}"
    return None


def letter_of(text: str) -> str | None:
    """The one option letter that the spelled `text` names, as in "(A)", "A. 5" or "Option A"."""
    match = _LETTER.match(text)
    if match is None or _MORE_LETTERS.match(text, match.end()):
        return None
    return next(g for g in match.groups() if g)
