"""The writing of mathematical answers in one form: markdown, Unicode, spaces, digits, units, words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\u2015\ufe63\uff0d", "-"),
    **dict.fromkeys(
        "\u00a0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
    ),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", ""),
    "\u2018": "'",
    "\u2019": "'",
    "\u00d7": r"\times ",
    "\u00f7": r"\div ",
    "\u00b7": r"\cdot ",
    "\u22c5": r"\cdot ",
    "\u2215": "/",
    "\u2044": "/",
    "\u221e": r"\infty ",
    "\u00b1": r"\pm ",
    "\u2213": r"\mp ",
    "\u2264": r"\le ",
    "\u2a7d": r"\le ",
    "\u2265": r"\ge ",
    "\u2a7e": r"\ge ",
    "\u2260": r"\ne ",
    "\u2248": r"\approx ",
    "\u2245": r"\approx ",
    "\u222a": r"\cup ",
    "\u2229": r"\cap ",
    "\u2208": r"\in ",
    "\u2205": r"\emptyset ",
    "\u00b0": r"^\circ ",
    "\u03c0": r"\pi ",
    "\u03b1": r"\alpha ",
    "\u03b2": r"\beta ",
    "\u03b3": r"\gamma ",
    "\u03b8": r"\theta ",
    "\u03bb": r"\lambda ",
    "\u2211": r"\sum ",
    "\u211d": r"\mathbb{R}",
    "\u27e8": r"\langle ",
    "\u27e9": r"\rangle ",
    "\u20ac": r"\euro ",
    "\u00a3": r"\pounds ",
    "\u00bd": r"\frac{1}{2}",
    "\u2153": r"\frac{1}{3}",
    "\u2154": r"\frac{2}{3}",
    "\u00bc": r"\frac{1}{4}",
    "\u00be": r"\frac{3}{4}",
    "\u2155": r"\frac{1}{5}",
    "\u215b": r"\frac{1}{8}",
    "\u215c": r"\frac{3}{8}",
    "\u215d": r"\frac{5}{8}",
    "\u215e": r"\frac{7}{8}",
    **{character: str(digit) for digit, character in enumerate(map(chr, range(0xFF10, 0xFF1A)))},
}
_TRANSLATION = str.maketrans(_CHARACTERS)
_RAISED = "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f"
_RAISED_AS = str.maketrans(_RAISED, "0123456789+-n")
_LOWERED = "\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089"
_LOWERED_AS = str.maketrans(_LOWERED, "0123456789")

_FUNCTIONS = (
    "arccos|arccot|arcsin|arctan|arg|cosh|cos|cot|csc|det|exp|gcd|infty|lcm|ln|log|max|min|mod|pi|sec|sinh|sin"
    "|sqrt|tanh|tan"
)
_BARE_FUNCTION = re.compile(rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])")
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\{[^{}]*\}(?:\{[^{}]*\})?")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND = re.compile(
    r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\\(?:land|lor|vee|wedge)(?![A-Za-z])|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])",
    re.IGNORECASE,
)
_POWERS = {"thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_LARGE_NUMBER = re.compile(
    rf"(\d+(?:\.\d+)?)\s*(\\text\s*\{{)?\s*({'|'.join(_POWERS)})(?![A-Za-z])(\s*\}})?", re.IGNORECASE
)
_SAID_BEFORE = re.compile(
    r"^(?:so\s+|thus,?\s+|therefore,?\s+)?(?:(?:the\s+)?(?:final\s+)?answer)(?:\s+is)?\s*[:=]?\s*(?=\S)",
    re.IGNORECASE,
)

# In this order; a command ends where no letter follows.
_REPLACED = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:boxed|fbox)(?![A-Za-z])", ""),
        (r"\\!|\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"\\(?:tiny|small|normalsize|large|Large|LARGE|huge|Huge|bf|rm|it|bfseries)(?![A-Za-z])", ""),
        (r"\\(?:(?:text)?color|colorbox)\s*\{[^{}]*\}|\\(?:boldsymbol|bm|ensuremath)(?![A-Za-z])", ""),
        (r"\\(?:math|text)(?:bf|rm|it|sf)\s*(?=\{\s*[-+]?\s*\\frac)", ""),
        (r"\\(?:thinspace|medspace|thickspace|enspace|quad|qquad)(?![A-Za-z])|(?<!\\)\\[,;:> ]|~", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?(?=\s*[(\[\\)\]|<>{}/]|$)", ""),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}\s*\{\s*\\text\s*\{([^{}]*)\}\s*\}", r"\\text{\1/\2}"),
        (r"([A-Za-z\d]+)\s*\\choose\s*([A-Za-z\d]+)", r"\\binom{\1}{\2}"),
        (
            r"\\(?:math(?:rm|bf|it|sf)|text(?:bf|it|rm|tt|normal)|mbox|emph|underline|operatorname\*?)\s*\{",
            r"\\text{",
        ),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}|\\O(?![A-Za-z])", r"\\emptyset"),
        (r"\\(?:leqslant|leq)(?![A-Za-z])", r"\\le"),
        (r"\\(?:geqslant|geq)(?![A-Za-z])", r"\\ge"),
        (r"\\neq(?![A-Za-z])", r"\\ne"),
        (r"\\(?:simeq|cong|sim)(?![A-Za-z])", r"\\approx"),
        # Markdown, and Python's powers.
        (r"\*\*(?=[^*]*\*\*)|(?<=[^*])\*\*(?![\d(])|^\*\*|^__(?=.*__$)|__$|`", ""),
        (r"(?<=\d)\s*\*\*\s*(?=[-\d(])", "^"),
    )
]


def canonical(text: str) -> str:
    """One way to write the same answer: no decoration, no spacing commands, ASCII, one kind of fraction."""
    text = text.replace("\0", " ").translate(_TRANSLATION)
    text = re.sub(f"[{_RAISED}]+", lambda found: "^{" + found[0].translate(_RAISED_AS) + "}", text)
    text = re.sub(f"[{_LOWERED}]+", lambda found: "_{" + found[0].translate(_LOWERED_AS) + "}", text)
    text = re.sub(
        "([\u221a\u221b])\\s*(\\d+(?:\\.\\d+)?|[A-Za-z]|\\((?:[^()]*)\\)|\\{(?:[^{}]*)\\})", _root, text
    )
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    text = _outer_stripped(text)
    text = re.sub(
        r"^\\text\s*\{((?:so )?(?:the )?(?:final )?answer(?: is)?)\s*[:=]?\s*\}",
        r"\1 ",
        text,
        flags=re.IGNORECASE,
    )
    text = _SAID_BEFORE.sub("", text)
    text = _outer_stripped(text)
    text = re.sub(r"\\text\s*\{\s*([^A-Za-z{}]*|[eid]|[A-Z])\s*\}", lambda found: found[1] or " ", text)
    text = re.sub(r"(?<![A-Za-z])([ap])\.\s?m(?:\.|(?![A-Za-z]))", r"\1m", text)
    text = re.sub(r"\^\s*([-+]\d+)", r"^{\1}", text)
    text = re.sub(r"\{\s*:\s*\}", ":", text)
    text = re.sub(r"\{\s*,\s*\}", "\0", text)
    text = re.sub(r"(?<=\d)\0(?=\d)", "", text).replace("\0", ",")
    text = _thousands_joined(text)
    text = _LARGE_NUMBER.sub(_large_number, text)
    text = _AND.sub(",", text)
    text = re.sub(r",\s*(?:,\s*)+", ", ", text)
    text = _BARE_FUNCTION.sub(r"\\\1", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\w.}\\] )(?<![\w.}\\])(\d+) (\d+)/(\d+)(?![\d/])", r"\1\\frac{\2}{\3}", text)
    if _ANGLE_FUNCTION.search(text):
        text = re.sub(r"(\d+(?:\.\d+)?)\s*\^\s*\{?\s*\\circ\s*\}?", r"(\\frac{\1\\pi}{180})", text)
    text = _repeating(text)
    text = re.sub(
        r"(?<![A-Za-z_\d.])(\d+(?:\.\d+)?)\s*[eE]\s*([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}", text
    )
    text = re.sub(r"(?<![\d.])\.(?=\d)", "0.", text)
    text = re.sub(r"(?<=\d)\.(?![\d.])", "", text)
    return re.sub(r"\s+", " ", text).strip()


def _outer_stripped(text: str) -> str:
    before = None
    while text != before:
        before = text
        text = text.strip().removesuffix(",").removesuffix(";")
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1]
        text = re.sub(r"(?<!\\)\\$", "", text)  # what a space behind it has left of a spacing command
        if text.startswith(r"\(") or text.startswith(r"\["):
            text = text[2:].removesuffix(r"\)").removesuffix(r"\]")
        text = text.removesuffix(r"\)") if r"\(" not in text else text
        text = re.sub(r"^\$\$|\$\$$", "", text)
        # A dollar sign before a number is the currency's, unless another one closes it.
        if text.startswith("$") and text.count("$") == 2 and text.endswith("$"):
            text = text[1:-1]
        elif text.endswith("$") and not text.startswith("$"):
            text = text[:-1]
        if text.startswith("{") and text.endswith("}") and _closes_last(text):
            text = text[1:-1]
        if text.startswith("*") or text.endswith("*"):
            text = text.strip("*")
        if text.startswith("__") and text.endswith("__"):
            text = text.strip("_")
    return text


def _closes_last(text: str) -> bool:
    """Whether the first brace is closed by the last one."""
    depth = 0
    for place, character in enumerate(text):
        if text[place - 1 : place] == "\\":
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _root(found: re.Match[str]) -> str:
    inside = found[2].strip("(){}") if found[2][0] in "({" else found[2]
    return (r"\sqrt" if found[1] == "\u221a" else r"\sqrt[3]") + "{" + inside + "}"


def _thousands_joined(text: str) -> str:
    """1,234 and 1 234 as 1234; between brackets a comma without a space separates."""
    text = re.sub(
        r"(?<![\d.,] )(?<![\d.,])([1-9]\d{0,2}(?: \d{3})+)(?![\d/]| \d|\s*\\frac)",
        lambda found: found[0].replace(" ", ""),
        text,
    )
    depth, joined = 0, []
    for part in re.split(r"(\\[{}]|[()\[\]])", text):
        if part in ("(", "[", r"\{", ")", "]", r"\}"):
            depth += 1 if part in ("(", "[", r"\{") else -1
        elif depth <= 0:
            part = re.sub(
                r"(?<![\d.,])(?:[1-9]\d{0,2}|0)(?:,\d{3})+(?![\d]|,\d)",
                lambda found: found[0].replace(",", ""),
                part,
            )
        joined.append(part)
    return "".join(joined)


def _large_number(found: re.Match[str]) -> str:
    """7 million as 7 x 10^6; the unit behind it stays."""
    number, opening, name, closing = found.groups()
    rest = "" if bool(opening) == bool(closing) else opening or closing
    return rf"{number} \times 10^{{{_POWERS[name.lower()]}}}{rest}"


def _repeating(text: str) -> str:
    r"""0.\overline{3}, 0.(3) and 0.333... as fractions."""
    text = re.sub(
        r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot|overset\{\\cdot\}|widehat)\s*\{(\d+)\}|\\(?:overline|bar|dot)\s*(\d)|\((\d+)\))",
        lambda found: _as_fraction(found[1], found[2], found[3] or found[4] or found[5]),
        text,
    )
    return re.sub(
        r"(?<!\d)(\d{0,12})\.(\d{0,6}?)(\d{1,6}?)(\3{2,20})(?:\.{2,}|\\(?:ldots|dots|cdots)|\u2026)",
        lambda found: _as_fraction(found[1], found[2], found[3]),
        text,
    )


def _as_fraction(whole: str, head: str, period: str) -> str:
    under = (10 ** len(period) - 1) * 10 ** len(head)
    over = int((whole or "0") + head + period) - int((whole or "0") + head)
    return rf"\frac{{{over}}}{{{under}}}"


def split_top(text: str, *marks: str) -> list[str]:
    """The parts between marks that stand in no bracket; half-open intervals close each other's."""
    parts, depth, begin, place = [], 0, 0, 0
    while place < len(text):
        two = text[place : place + 2]
        if two in (r"\{", r"\}"):
            depth += 1 if two == r"\{" else -1
            place += 2
            continue
        if text[place] in "([{":
            depth += 1
        elif text[place] in ")]}":
            depth -= 1
        mark = next((mark for mark in marks if depth == 0 and text.startswith(mark, place)), None)
        if mark is not None:
            parts.append(text[begin:place])
            begin = place = place + len(mark)
            continue
        place += 1
    parts.append(text[begin:])
    return [part.strip() for part in parts]


def plain_words(text: str) -> str:
    """Without commands and braces of LaTeX."""
    text = _ENVIRONMENT.sub(" ", text)
    text = _TEXT.sub(r" \1 ", text)
    return _COMMAND.sub(" ", text).replace("{", " ").replace("}", " ")


def is_words(text: str) -> bool:
    """Whether an answer is words, which are spelt, and no product of letters, which commutes."""
    plain = plain_words(text)
    if re.search(r"\d", plain) or re.search(
        r"[-+*/^=<>|]", re.sub(r"(?<=[A-Za-z])-(?=[A-Za-z]{2})", "", plain)
    ):
        return bool(re.match(r"\s*[A-Za-z]{3,}\s+\S", plain)) and "=" not in plain
    if re.search(r"\\(?:frac|sqrt|cdot|times|pm|infty|pi|sum|int|cup|cap|in|le|ge|ne)(?![A-Za-z])", text):
        return False
    runs = re.findall("[A-Za-z]+", plain)
    is_text = bool(re.search(r"\\text\s*\{[^{}]*[A-Za-z]{2}", text))
    return is_text or any(len(run) > 1 and not set(run) <= set("xyz") for run in runs if run not in ("i",))


def normal_words(text: str) -> str:
    """Words as they are compared: without capitals, punctuation and spacing."""
    text = plain_words(text).casefold()
    return re.sub(r"(?<!\d)\s|\s(?!\d)|[_\"'`!?$\\]|(?<!\d)\.|\.(?!\d)", "", text)


def choice(text: str, *, with_text: bool = False) -> str | None:
    r"""The letter of a multiple choice: A, (A) or A., and with_text also `(A) 5`; None for anything else."""
    plain = " ".join(plain_words(text).split()) if not re.search(r"[\^_=]", text) else text
    found = re.fullmatch(r"\(?\s*([A-Z])\s*\)?[.:]?", plain)
    if found is None and with_text:
        plain = re.sub(r"^(?i:option|choice)\s+(?=\(?[A-Z](?![A-Za-z]))", "", plain)
        found = re.fullmatch(r"([A-Z])", plain) or re.match(
            r"(?:\(\s*([A-Z])\s*\)|([A-Z])\s*[).:])\s*(?=\S)", plain
        )
        rest = plain[found.end() :] if found else ""
        if re.search(
            r"(?<![A-Za-z])(?:[A-Z]\s*[).:]|[A-Z]$|(?i:and|or|not)(?![A-Za-z]))|,\s*[A-Z](?![a-z])", rest
        ):
            return None
    return (found[1] or found[found.lastindex or 1]) if found else None


def with_spaces_closed(text: str) -> str:
    """Without spaces, except where they keep a command from the letter behind it or a digit from a digit."""
    return re.sub(r"(?<!\d)\s+(?!\d)|(?<=\d)\s+(?!\d)|(?<!\d)\s+(?=\d)", _kept_space, text.strip())


def _kept_space(found: re.Match[str]) -> str:
    before, after = found.string[: found.start()], found.string[found.end() :]
    return " " if re.search(r"\\[A-Za-z]+$", before) and re.match("[A-Za-z]", after) else ""


_SAME_UNIT = {
    "%": "percent pct percentage",
    "degree": "degrees deg",
    "dollar": "dollars usd bucks",
    "cent": "cents \u00a2",
    "euro": "euros eur",
    "pound": "pounds gbp lb lbs",
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "dm": "decimeter decimeters",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "mg": "milligram milligrams",
    "g": "gram grams",
    "kg": "kilogram kilograms kilo kilos",
    "oz": "ounce ounces",
    "ml": "milliliter milliliters millilitre millilitres",
    "l": "liter liters litre litres",
    "gal": "gallon gallons",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "month": "months",
    "year": "years yr yrs",
    "mi/h": "mph",
    "km/h": "kmh kph",
    "rad": "radian radians",
    "unit": "units",
    "ms": "millisecond milliseconds",
    "n": "newton newtons",
    "j": "joule joules",
    "w": "watt watts",
    "kw": "kilowatt kilowatts",
    "v": "volt volts",
    "hz": "hertz",
    "pa": "pascal pascals",
    "mol": "mole moles",
}
_UNITS = {name: unit for unit, names in _SAME_UNIT.items() for name in (unit, *names.split())}
# Read as a unit though nothing but a space, or not even that, stands before them.
_ATTACHED = frozenset(
    [
        "cm",
        "mm",
        "km",
        "kg",
        "mg",
        "ml",
        "ft",
        "hz",
        "kw",
        "usd",
        "mph",
        "kmh",
        "kph",
        "lbs",
        "pm",
        "am",
        "hrs",
    ]
)
_NO_UNIT = re.compile(
    r"\b(?:and|or|not|no|isn'?t|is|are|was|if|else|to|wrong|false|maybe|perhaps|either|neither|but|except|than|"
    r"more|less|over|under|at|least|most|about|times|minus|plus|half|thirds?|quarters?|hundreds?|thousands?|"
    r"millions?|billions?|dozens?|squared|cubed|factorial|modulo|mod|base|mixed)\b"
)
_WORD_UNIT = re.compile(
    r"(?P<value>.*[\d)}\]!]|\S*\\pi|.*\\infty)(?P<unit>(?:\\text\s*\{[^{}]*\}|[A-Za-z]|[/.\s%-]|\\[%$]|\^\\circ|\^\{\s*\\circ\s*\}"
    r"|\\circ|\\degree|\\euro|\\pounds|\^\{?[23]\}?)+)",
    re.DOTALL,
)
_CURRENCY = re.compile(
    r"^(?P<sign>[-+]?)\s*(?P<mark>\\?\$|\\euro|\\pounds|\\text\{\$\}|US\$)\s*(?P<value>[-+]?[\d.\\].*)$"
)
_BASE_NAMES = {
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
    "twelve": "12",
    "sixteen": "16",
}
_BASE = re.compile(
    r"(?P<digits>-?[0-9A-Fa-f]+(?:\.[0-9A-Fa-f]+)?|\((?:[0-9A-Fa-f]+)\)|\\text\{[0-9A-F]+\})\s*_\s*\{?\s*(?:\\text\s*\{)?\s*(?P<base>\d{1,2}|[a-z]+)\s*\}?\}?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantity:
    """A value in LaTeX, its unit in one spelling and the base of its digits, both empty where not written."""

    value: str
    unit: str = ""
    base: str = ""

    def agrees_with(self, answer: Quantity) -> bool:
        """Whether unit and base of an answer are these; what one of the two leaves out is the question's."""
        if self.base != answer.base and answer.base not in ("", "10" if not self.base else ""):
            return False
        mine, other = set(self.unit.split()), set(answer.unit.split())
        if "%" in mine | other:
            return not mine or not other or mine == other
        return mine <= other or other <= mine


def quantity(text: str) -> Quantity:
    """Read value, unit and base."""
    text = text.strip()
    based = _BASE.fullmatch(text)
    if based:
        base = _BASE_NAMES.get(based["base"], based["base"])
        digits = re.sub(r"\\text|[{}()]", "", based["digits"]).upper()
        if base.isdigit() and 2 <= int(base) <= 36:
            return Quantity(value=digits.lstrip("0") or "0", base=base)
    money = _CURRENCY.match(text)
    if money:
        rest = quantity(money["sign"] + money["value"])
        unit = {"\\euro": "euro", "\\pounds": "pound"}.get(money["mark"], "dollar")
        others = [word for word in rest.unit.split() if word != unit]
        return Quantity(value=rest.value, unit=" ".join([unit, *others]))
    # The shortest unit that reads as one; a letter right behind a number is a variable.
    for found in (_WORD_UNIT.fullmatch(text), _split_off(text)):
        if found is not None:
            unit = _unit(found["unit"], found["value"])
            if unit is not None and not re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", found["value"]):
                return Quantity(value=_outer_stripped(found["value"]), unit=unit)
    return Quantity(value=text)


def _split_off(text: str) -> Mapping[str, str] | None:
    """Everything from the first \\text or word on, where only words follow."""
    found = re.search(r"\\text\s*\{|(?<=\d)\s+[A-Za-z]{2}|\^\{?\\circ|\\?%", text)
    return (
        {"value": text[: found.start()], "unit": text[found.start() :]} if found and found.start() else None
    )


def _unit(written: str, value: str) -> str | None:
    """One spelling of a unit; None where it is none."""
    is_text = bool(re.match(r"\s*(?:\\text|\\?%|\\?\$|\^|\\circ|\\degree|\\euro|\\pounds)", written))
    plain = re.sub(r"\\(?:degree|circ)(?![A-Za-z])", " degree ", written)
    plain = re.sub(r"\^\s*\{?\s*degree\s*\}?", "degree", plain)
    plain = (
        re.sub(r"\\?%", " % ", plain)
        .replace(r"\euro", " euro ")
        .replace(r"\pounds", " pound ")
        .replace(r"\$", " dollar ")
    )
    plain = " ".join(plain_words(_TEXT.sub(r"\1", plain)).casefold().split())
    plain = re.sub(r"(?<=[a-z])\s*\^\s*", "^", plain)
    words = re.findall(r"[a-z%]+(?:\^\d)?|/", plain)
    if not words or re.search(r"\d", re.sub(r"\^\d", "", plain)) or _NO_UNIT.search(plain) or len(words) > 6:
        return None
    if not is_text:
        # 2ab and 3xy are products.
        first = words[0].partition("^")[0]
        is_near = not re.match(r"\s", written)
        if is_near and first not in _ATTACHED:
            return None
        is_ratio = "/" in words and all(word.partition("^")[0] in _UNITS for word in words if word != "/")
        if len(first) < 2 and not (first in "mgshl" and len(words) == 1) and not is_ratio:
            return None
        if len(first) == 2 and first not in _UNITS and first not in _ATTACHED:
            return None
    return _spelt(words)


def _spelt(words: list[str]) -> str:
    power = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
    spelt: list[str] = []
    raised, is_divided = "", False
    for word in words:
        if word in power:
            raised = power[word]
            continue
        if word in ("/", "per"):
            is_divided = bool(spelt)
            continue
        if word in ("of", "the", "a", "an"):
            continue
        name, caret, exponent = word.partition("^")
        name = _UNITS.get(name, name.removesuffix("s") if len(name) > 3 else name) + caret + exponent + raised
        raised = ""
        if is_divided:
            spelt[-1] += "/" + name
            is_divided = False
        else:
            spelt.append(name)
    return " ".join(spelt)
