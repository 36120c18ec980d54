r"""Mathematical answers: find the final one in a response, compare it with the gold answer.

All of it is synchronous and free of state; `verify.py` decides where it runs. `stated` is cheap and linear in the
response, so it runs on the spot. Two comparisons of what it found give the same verdicts:

- `same_integer` knows only plain integer literals and costs microseconds, so a trainer whose problems are integers
  never pays for a process pool or for importing sympy;
- `compare` is Math-Verify: LaTeX, sets, intervals, matrices, units, percentages.

An answer counts where it is marked as one: on a last line "Answer: ...", else in the last \boxed{...}. Boxes that are
joined ("\boxed{1} and \boxed{2}", "or", a comma) are one answer, a set. Whoever hedges gets nothing for it.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

# ""            scored, right or wrong
# "no answer"   nothing in the response is marked as its answer and can be read
# "unclear"     something is, but it is not one answer: a guess among several, a denial, a relation or an unevaluated
#               sum where the gold answer has none, a box that a later "the answer is ..." contradicts
# "bad gold"    the gold answer cannot be read
# "timeout"     not decided within the deadline
# "crash"       the worker process died over it
Reason = Literal["", "no answer", "unclear", "bad gold", "timeout", "crash"]
Span = tuple[int, int, int, int]  # of a whole box, and of what is in it

_ANSWER_LABEL = re.compile(r"[\s*#>_]*(?:the\s+)?(?:final\s+)?answer[\s*_]*:", re.IGNORECASE)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:[{}]|\\(?!boxed|fbox))|[{}]")
_FORMULA = re.compile(r"(?<!\\)\$\$?(?=\S)([^$]*?\S)(?<!\\)\$\$?(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]")
_DOLLAR = re.compile(r"(?<!\\)\$")  # a delimiter, not an amount of money
_JOINED = re.compile(r"(?:[\s$,;]|\\[()\[\]]|\b(?:and|or)\b|\\text\s*\{[\s,]*(?:and|or)[\s,]*\})*")
_GUESSED = re.compile(r"[^.\n]*\b(?:or|maybe|perhaps|possibly|else)\b[^.\n]*", re.IGNORECASE)
_DENIED = re.compile(
    r"\b(?:not?|never|cannot|except|but|unless|maybe|perhaps|possibly|either|else)\b|n't\b", re.IGNORECASE
)
_COMMAND = re.compile(r"\\[A-Za-z]+\s*(\{[A-Za-z\s]*\})?")  # with an argument that is a word: \text{cm}
_WORD = re.compile(r"(?<![A-Za-z])(?!(?:and|or|in)\b)[A-Za-z]{2,}")  # beyond the glue of a set or an interval
_PLAIN_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# Words around one number, which may be a fraction and have a unit with a power.
_WORDS = r"(?:[^\W\d_]|(?<=[^\W\d_])-(?=[^\W\d_])|[\s.,:;'\"()/*=%°$€£])*"
_PROSE = re.compile(
    rf"{_WORDS}(?<![^\W\d_]){_PLAIN_NUMBER.pattern}(?:/\d+)?{_WORDS}(?:(?<=[a-z])(?:\^\d|[23²³]){_WORDS})?"
)
_LATER = re.compile(rf"\banswer(?:\s+is|\s*[:=])[\s*$({{]*({_PLAIN_NUMBER.pattern})(?![\d/^\\])", re.IGNORECASE)
# Math-Verify overlooks these, or would have to do the sum itself.
_RELATION = re.compile(r"\s*(?:\\(?:n?[lg]eq?|[lg]eqslant|ne|neq|[lg]t|neg|lnot|not)(?![A-Za-z])|[<>≠≤≥¬])")
_WORK = re.compile(
    r"\\(?:lor|land|vee|wedge|neg|lnot|oplus|i{0,3}int|oint|sum|prod|lim(?:sup|inf)?|bigcup|bigcap)(?![A-Za-z])"
)
_TEXT = re.compile(r"\\(?:text[a-z]*|math(?:rm|bf|it|sf)|[mh]box|operatorname)\s*\{([^{}]*)\}")
_CONNECTIVE = re.compile(r"\\text\s*\{[\s,]*(?:and|or)[\s,]*\}")
_UNIT = re.compile(rf"{_TEXT.pattern}|\^\s*(?:\{{[^{{}}]*\}}|-?\w)|\\(?:circ|q?quad|left|right)(?![A-Za-z])")
_BASE = re.compile(r"\s*-?[^\W_]+\s*_\s*\{?(\d+)\}?\s*")
_MOST_BOXES = 6  # that Math-Verify joins
# Signs other than "-", leading zeros and separators are left to Math-Verify.
_INTEGER = re.compile(r"0|-?[1-9][0-9]{0,17}")
_BOXED_INTEGER = re.compile(rf"\\boxed\{{({_INTEGER.pattern})\}}")


def stated(response: str, max_chars: int, anywhere: bool = False) -> tuple[str, Reason]:
    r"""The answer of a response, written as Math-Verify reads it best, and ""; or "" and why there is none.

    Args:
        max_chars: the longest answer; a longer one is none.
        anywhere: where nothing is marked as the answer, hand over the response's last `max_chars` as they are.
    """
    line = _answer_line(response)
    if line is None:
        boxes = _boxes(response)
        if not boxes:
            return (response[-max_chars:], "") if anywhere else ("", "no answer")
        return _boxed(response, boxes, max_chars)
    if len(line) > max_chars:
        return "", "unclear"
    if marked := _boxes(line) or [(*m.span(), *m.span(m.lastindex or 0)) for m in _FORMULA.finditer(line)]:
        around = line[: marked[0][0]] + " " + line[marked[-1][1] :]
        return ("", "unclear") if _DENIED.search(around) else _boxed(line, marked, max_chars)
    line = _DOLLAR.sub("", line).strip()
    # In a box, Math-Verify reads all of it. In prose around a number ("34 apples", "it is 34") the number counts.
    if not (any(char.isdigit() for char in line) and _WORD.search(_COMMAND.sub("", line))):
        return _box([line.removesuffix(".")])
    if _DENIED.search(line) or not _PROSE.fullmatch(line):
        return "", "unclear"
    return f"Answer: {line}", ""


def same_integer(answer: str, gold: str) -> bool | None:
    """Decide without Math-Verify if what is `stated` and the gold answer are plain integers; else None."""
    boxed = _BOXED_INTEGER.fullmatch(answer)
    return int(boxed[1]) == int(gold) if boxed and _INTEGER.fullmatch(gold) else None


def grade(response: str, gold: str, max_chars: int) -> tuple[float, Reason]:
    """`stated` and `compare` in one."""
    answer, reason = stated(response, max_chars)
    return (0.0, reason) if reason else compare(answer, gold)


def compare(answer: str, gold: str) -> tuple[float, Reason]:
    """Math-Verify's verdict on what is `stated`, as (score, reason). It sets no timer: the caller bounds the time."""
    from math_verify import verify

    expected = _parse_gold(gold)
    if not expected:
        return 0.0, "bad gold"
    inner = answer.removeprefix("\\boxed{").removesuffix("}")
    if any(sign(inner) and not sign(gold) for sign in (_RELATION.match, _WORK.search, _goes_on)):
        return 0.0, "unclear"
    if (base := _BASE.fullmatch(inner)) and base[1] != (of[1] if (of := _BASE.fullmatch(gold)) else "10"):
        return 0.0, ""
    found = _parse(answer)
    if not found:
        return 0.0, "no answer"
    # Both lists hold the expression, then its text. Texts first: equal ones spare the symbolic comparison.
    return float(verify(expected[::-1], found[::-1], timeout_seconds=None)), ""


def _goes_on(content: str) -> bool:
    """Whether mathematics follows a unit or another word behind an expression: Math-Verify stops reading there."""
    for part in _CONNECTIVE.split(content):
        word = _TEXT.search(part)
        if word and any(char.isalnum() for char in part[: word.start()].rpartition("=")[2]):
            rest = _UNIT.sub("", part[word.end() :])
            if any(char.isalnum() for char in rest) or any(char.isdigit() for char in word[1]):
                return True
    return False


def _answer_line(response: str) -> str | None:
    """What follows "Answer:" on the last line that is not blank, or None where that line has another form."""
    line = response.rstrip()
    label = _ANSWER_LABEL.match(line, line.rfind("\n") + 1)
    return line[label.end() :].strip("*_ \t\r") if label else None


def _boxes(text: str) -> list[Span]:
    r"""All complete \boxed{...} (or \fbox) that are in no other one, in order."""
    open_: list[re.Match[str]] = []
    found: list[Span] = []
    for token in _BRACES.finditer(text):
        if token[0].endswith("{") and token[0] != "\\{":
            open_.append(token)
        elif token[0] == "}" and open_:
            opening = open_.pop()
            if len(opening[0]) > 1:
                while found and found[-1][0] > opening.start():
                    found.pop()
                found.append((opening.start(), token.end(), opening.end(), token.start()))
    return found


def _balanced(content: str) -> bool:
    depth = 0
    for token in _BRACES.findall(content):
        depth += 1 if token[-1] == "{" and token != "\\{" else -1 if token == "}" else 0
        if depth < 0:
            return False
    return depth == 0


def _boxed(text: str, spans: list[Span], max_chars: int) -> tuple[str, Reason]:
    """The last one, with those before it that are joined to it."""
    group = [spans[-1]]
    for span in reversed(spans[:-1]):
        between = text[span[1] : group[-1][0]]
        if len(between) > 60 or not (_JOINED.fullmatch(between) or _GUESSED.fullmatch(between)):
            break
        group.append(span)
        if len(group) > _MOST_BOXES:
            return "", "unclear"
    if max(end - start for _, _, start, end in group) > max_chars:
        return "", "unclear"
    contents = [_unwrapped(text[start:end]) for _, _, start, end in reversed(group)]
    later = _LATER.findall(text, spans[-1][1])
    if later and _PLAIN_NUMBER.fullmatch(contents[-1]) and _value(later[-1]) != _value(contents[-1]):
        return "", "unclear"
    return _box(contents)


def _unwrapped(content: str) -> str:
    """What is in the innermost of boxes that hold nothing but a box."""
    content = _DOLLAR.sub("", content).strip()
    while (inner := _boxes(content)) and inner[0][:2] == (0, len(content)):
        content = content[inner[0][2] : inner[0][3]].strip()
    return content


def _box(contents: list[str]) -> tuple[str, Reason]:
    if not all(content.strip(" \t\r\n{}\\,;.~") for content in contents):
        return "", "no answer"
    if any(_boxes(content) or not _balanced(content) for content in contents):  # a box beside something, in a box
        return "", "unclear"
    if len(contents) == 1:
        return f"\\boxed{{{contents[0]}}}", ""
    return " and ".join(f"$\\boxed{{{content}}}$" for content in contents), ""


def _value(number: str) -> float:
    return float(number.replace(",", ""))


@lru_cache(maxsize=4096)  # every response of a group is compared with the same gold
def _parse_gold(gold: str) -> list[Any]:
    from math_verify import LatexExtractionConfig, parse

    inner = _DOLLAR.sub("", gold).strip()
    return parse(f"\\boxed{{{inner}}}", [LatexExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]


def _parse(answer: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    # A box that cannot be read is no answer: nothing else in it may be taken for one.
    boxed = "\\boxed{" in answer
    how: list[Any] = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=not boxed)]
    return parse(answer, how if boxed else [*how, ExprExtractionConfig()], parsing_timeout=None)  # pyright: ignore[reportArgumentType]
