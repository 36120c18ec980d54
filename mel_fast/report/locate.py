"""Where two solutions part: the bifurcation point that M names, and the first token that differs.

M tells the bifurcation point s* in words. Its place in the wrong solution is looked for by, in this order: a passage
that s* quotes, a step or line that it counts, a passage that it repeats, and what M names and only the wrong solution
has. Each place comes with how it was found, for a reader to judge it; no place is better than a wrong one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mel_fast.types import MetaExperience

QUOTED = re.compile(
    r"\"([^\"\n]{2,200})\"|“([^”\n]{2,200})”|`([^`\n]{2,200})`|\$([^$\n]{2,200})\$|\\\((.{2,200}?)\\\)"
    r"|(?<!\w)'([^'\n]{2,200})'(?!\w)"
)
COUNTS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
CARDINALS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COUNTED = re.compile(
    rf"\b(?P<unit>step|line|paragraph|sentence)\s+#?(?P<after>\d{{1,3}}|{'|'.join(CARDINALS)})\b"
    rf"|\b(?P<before>\d{{1,3}}(?:st|nd|rd|th)|{'|'.join(COUNTS)})\s+(?P<noun>step|line|paragraph|sentence)\b",
    re.IGNORECASE,
)
LABEL = r"^[ \t#*_>(]*(?:step[ \t]*)?{number}[ \t]*[.:)\]*-]"
SENTENCE = re.compile(r"\S.*?(?:[.!?](?=\s|$)|$)", re.MULTILINE)
LINE = re.compile(r"[^\n]*\S[^\n]*")
WORD = re.compile(r"\w+(?:[.,]\d+)*|[^\w\s]")
SHORTEST_RUN = 3  # words in common that are taken for a repeated passage


@dataclass(frozen=True, slots=True)
class Place:
    """A span of a text, in characters, and how it was found."""

    start: int
    end: int
    how: str


def bifurcation(meta: MetaExperience, wrong: str, right: str) -> Place | None:
    """The place of s* in the wrong solution; None where it cannot be located."""
    return (
        _quoted(meta.bifurcation, wrong, "quoted in s*")
        or _counted(meta.bifurcation, wrong)
        or _repeated(meta.bifurcation, wrong)
        or _quoted(meta.critique, wrong, "quoted in the critique")
        or _contrasted(f"{meta.bifurcation}\n{meta.critique}", wrong, right)
    )


def first_difference(
    wrong: tuple[Sequence[int], str], right: tuple[Sequence[int], str], decode: Callable[[Sequence[int]], str] | None
) -> tuple[Place, Place] | None:
    """The first token in which two solutions (ids, text) differ, as a place in each; without a tokenizer, or where its
    texts do not add up, the first character. None when they are equal."""
    if decode is not None and list(wrong[0]) != list(right[0]):
        shared = _shared(wrong[0], right[0])
        before = decode(wrong[0][:shared])
        if wrong[1].startswith(before) and right[1].startswith(before):
            how = f"token {shared + 1}"
            places = [
                Place(len(before), min(len(text), len(decode(ids[: shared + 1]))), how) for ids, text in (wrong, right)
            ]
            return places[0], places[1]
    if wrong[1] == right[1]:
        return None
    start = _shared(wrong[1], right[1])
    places = [Place(start, min(len(text), start + 1), f"character {start + 1}") for text in (wrong[1], right[1])]
    return places[0], places[1]


def _shared(one: Sequence[object], other: Sequence[object]) -> int:
    """The length of what both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _quoted(memo: str, text: str, how: str) -> Place | None:
    """The longest quotation that stands in the text, whatever its white space."""
    quotations = ["".join(filter(None, groups)).strip(" .,;:") for groups in QUOTED.findall(memo)]
    for quotation in sorted(dict.fromkeys(filter(None, quotations)), key=len, reverse=True):
        pattern = r"\s+".join(map(re.escape, quotation.split()))
        whole = (
            (r"(?<!\w)" if quotation[0].isalnum() else "") + pattern + (r"(?!\w)" if quotation[-1].isalnum() else "")
        )
        if found := re.search(whole, text):
            return Place(found.start(), found.end(), how)
    return None


def _counted(memo: str, text: str) -> Place | None:
    """A step by its label in the text, else by counting lines (or sentences, in a text of one line) with figures."""
    if (found := COUNTED.search(memo)) is None:
        return None
    unit = (found["unit"] or found["noun"]).lower()
    number = _number(found["after"] or found["before"])
    label = LABEL.format(number=rf"(?:{number}|{CARDINALS[number - 1]})" if 0 < number <= 10 else number)
    if unit == "step" and (labelled := re.search(label, text, re.IGNORECASE | re.MULTILINE)):
        line = LINE.search(text, text.rfind("\n", 0, labelled.end()) + 1)
        assert line is not None
        return Place(line.start(), line.end(), f"labelled as step {number}")
    lines, sentences = list(LINE.finditer(text)), list(SENTENCE.finditer(text))
    if unit == "paragraph":
        parts = list(re.finditer(r"\S(?:.|\n(?!\s*\n))*", text))
    elif unit == "line":
        parts = lines
    elif unit == "sentence":
        parts = sentences
    else:
        parts = [part for part in (lines if len(lines) > 1 else sentences) if re.search(r"\d", part.group())]
    if not 0 < number <= len(parts):
        return None
    note = " with figures: the text numbers no steps" if unit == "step" else ""
    noun = unit if unit != "step" else "line" if len(lines) > 1 else "sentence"
    return Place(*parts[number - 1].span(), f"counted: {noun} {number}{note}")


def _number(word: str) -> int:
    word = word.lower()
    for names in (COUNTS, CARDINALS):
        if word in names:
            return names.index(word) + 1
    return int(re.sub(r"\D", "", word))


def _repeated(memo: str, text: str) -> Place | None:
    """The longest run of words that s* has in common with the text."""
    words = list(WORD.finditer(text))
    start, size = _common_run(WORD.findall(memo.lower()), [word.group().lower() for word in words])
    run = words[start : start + size]
    telling = sum(len(word.group()) > 3 or word.group().isdigit() for word in run)
    if size < SHORTEST_RUN or telling < (2 if size == SHORTEST_RUN else 1):
        return None
    return Place(run[0].start(), run[-1].end(), "repeated in s*")


def _common_run(said: Sequence[str], words: Sequence[str]) -> tuple[int, int]:
    """Start and length of the first of the longest runs of `words` that stand in `said` too.

    By a suffix automaton of `said` (Blumer et al. 1985), in linear time: where a model loops, every word is every
    other, and comparing their places takes for ever.
    """
    nexts: list[dict[str, int]] = [{}]  # state -> word -> state; each stands for runs that end at the same places
    links, longest = [-1], [0]  # to the state of their shorter ends; the length of the longest of them
    last = 0
    for word in said:
        new, back = len(nexts), last
        nexts.append({})
        links.append(0)
        longest.append(longest[last] + 1)
        while back >= 0 and word not in nexts[back]:
            nexts[back][word] = new
            back = links[back]
        if back >= 0:
            known = nexts[back][word]
            if longest[known] > longest[back] + 1:  # its shorter runs now end at one place more: a state of their own
                nexts.append(dict(nexts[known]))
                links.append(links[known])
                longest.append(longest[back] + 1)
                links[known] = short = len(nexts) - 1
                while back >= 0 and nexts[back].get(word) == known:
                    nexts[back][word] = short
                    back = links[back]
                known = short
            links[new] = known
        last = new
    state = size = start = best = 0
    for place, word in enumerate(words):
        while state and word not in nexts[state]:
            state = links[state]
            size = longest[state]
        if word in nexts[state]:
            state = nexts[state][word]
            size += 1
        if size > best:
            start, best = place + 1 - size, size
    return start, best


def _contrasted(memo: str, text: str, right: str) -> Place | None:
    """The first of the words that the memo names and the wrong solution has but the right one has not."""
    said = set(WORD.findall(memo.lower()))
    elsewhere = set(WORD.findall(right.lower()))
    for word in WORD.finditer(text):
        found = word.group().lower()
        if found in said and found not in elsewhere and (len(found) > 3 or found.isdigit()):
            return Place(*word.span(), f"named in M: only the wrong solution has {word.group()!r}")
    return None
