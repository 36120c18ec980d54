"""A seeded world of two-step problems that can be checked.

Everything happens on a dial of the ten digits. A question names a topic and three numbers. Every topic obeys one of
eight rules, and a rule is two operations: the first makes x of two of the numbers, the second makes y of x and the
third. The answer is x and y written as one number of two digits, so that two rules seldom agree. Which numbers meet in
which order depends on the family of the topic: families differ in wiring as well as in wording.

So a wrong answer has one of two causes, just as for real problems: a misconception (the wrong rule for the topic) or a
slip in the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations, product
from random import Random
from typing import Literal

from mel_fast.tiny.config import WorldConfig
from mel_fast.tiny.names import BIRDS, COLOURS, HERBS, INSTRUMENTS, RULES, STONES

Group = Literal["sure", "trained", "sibling", "untrained"]
Numbers = tuple[int, int, int]

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "plus": lambda a, b: (a + b) % 10,
    "minus": lambda a, b: (a - b) % 10,
    "times": lambda a, b: (a * b) % 10,
    "max": max,
    "min": min,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """Two operations, named as in `OPERATIONS`."""

    name: str
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of problem. `wiring` holds the operands of the two operations: indices into the numbers, or "x"."""

    name: str
    question: str
    wiring: tuple[tuple[int, int], tuple[int | Literal["x"], int | Literal["x"]]]
    topics: tuple[str, ...]


FAMILIES = (
    Family("stones", "What is {topic} worth for {a}, {b} and {c}?", ((0, 1), ("x", 2)), STONES),
    Family("birds", "From {a}, {b} and {c}, where does {topic} land?", ((1, 2), (0, "x")), BIRDS),
    Family("herbs", "How tall is {topic} grown with {a}, {b} and {c}?", ((0, 2), ("x", 1)), HERBS),
    Family("instruments", "Which note does {topic} play on {a}, {b} and {c}?", ((2, 1), (0, "x")), INSTRUMENTS),
)


@dataclass(frozen=True, slots=True)
class Topic:
    """Something that questions are about.

    `belief` is what demonstrations hold true of the topic: rules with their probabilities, the right one first. A sure
    topic has that one alone; the others have two misconceptions besides.
    """

    name: str
    family: Family
    group: Group
    belief: tuple[tuple[Rule, float], ...]
    guild: str = ""  # what heuristics call it; "": by its name
    tacit: bool = False  # its solutions do not name the rule

    @property
    def rule(self) -> Rule:
        """The right one."""
        return self.belief[0][0]


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, as a solution states it. After a slip `result` is not what the operation gives."""

    a: int
    operation: str
    b: int
    result: int


@dataclass(frozen=True, slots=True)
class Slip:
    """A wrong result in one of the two steps: `offset` (1 to 9) digits further on the dial."""

    step: Literal[0, 1]
    offset: int


@dataclass(frozen=True, slots=True)
class Problem:
    """A topic and three digits."""

    topic: Topic
    numbers: Numbers

    @property
    def question(self) -> str:
        a, b, c = self.numbers
        return self.topic.family.question.format(topic=self.topic.name, a=a, b=b, c=c)

    @property
    def answer(self) -> str:
        return self.answer_by(self.topic.rule)

    def answer_by(self, rule: Rule, slip: Slip | None = None) -> str:
        return "".join(str(step.result) for step in self.steps(rule, slip))

    def steps(self, rule: Rule, slip: Slip | None = None) -> tuple[Step, Step]:
        """Both operations by this rule; a slip in the first is carried on into the second."""
        (i, j), (k, m) = self.topic.family.wiring
        first = _step(self.numbers[i], rule.first, self.numbers[j], slip.offset if slip and slip.step == 0 else 0)
        left, right = (first.result if index == "x" else self.numbers[index] for index in (k, m))
        return first, _step(left, rule.second, right, slip.offset if slip and slip.step == 1 else 0)


def _step(a: int, operation: str, b: int, offset: int) -> Step:
    return Step(a, operation, b, (OPERATIONS[operation](a, b) + offset) % 10)


class World:
    """Rules, topics and numbers, all drawn from one seed.

    Args:
        config: sizes, seed and strength of beliefs.
    """

    def __init__(self, config: WorldConfig) -> None:
        random = Random(f"world {config.seed}")
        self.config = config
        self.rules = _draw_rules(random)
        self.topics = tuple(self._draw_topics(random))
        triples: list[Numbers] = list(product(range(10), range(10), range(10)))
        random.shuffle(triples)
        self.reserved_numbers = triples[: config.reserved_numbers]
        """Shown by evaluation alone."""
        self.numbers = triples[config.reserved_numbers :]
        """Shown by demonstrations and in training."""

    def group(self, group: Group) -> list[Topic]:
        return [topic for topic in self.topics if topic.group == group]

    def _draw_topics(self, random: Random) -> Iterator[Topic]:
        if self.config.guilds:
            yield from self._draw_guilds(random)
            return
        sizes: dict[Group, int] = {
            "sure": self.config.sure,
            "trained": self.config.trained,
            "untrained": self.config.untrained,
        }
        groups: list[Group] = [group for group, size in sizes.items() for _ in range(size // len(FAMILIES))]
        for family in FAMILIES:
            for name, group in zip(random.sample(family.topics, len(groups)), groups, strict=True):
                yield Topic(name, family, group, self._draw_belief(random, group), tacit=self.config.tacit)

    def _draw_guilds(self, random: Random) -> Iterator[Topic]:
        """Four guilds of eight topics in each family; a belief is about a guild."""
        parts: tuple[tuple[Group, Group], ...] = (
            ("sure", "sure"),
            ("trained", "sibling"),
            ("trained", "sibling"),
            ("untrained", "untrained"),
        )
        for family in FAMILIES:
            names = random.sample(family.topics, 32)
            colours = random.sample(COLOURS, len(parts))
            for place, (colour, groups) in enumerate(zip(colours, parts, strict=True)):
                belief = self._draw_belief(random, groups[0])
                for index, name in enumerate(names[8 * place : 8 * place + 8]):
                    guild = f"{colour} {family.name}"
                    yield Topic(name, family, groups[index % 2], belief, guild, self.config.tacit)

    def _draw_belief(self, random: Random, group: Group) -> tuple[tuple[Rule, float], ...]:
        right, *misconceptions = random.sample(self.rules, 3)
        if group == "sure":
            return ((right, 1.0),)
        p = random.uniform(self.config.belief_low, self.config.belief_high)
        share = random.uniform(0.35, 0.65)  # unequal, so that the right rule's rank differs from topic to topic
        first, second = misconceptions
        return (right, p), (first, (1 - p) * share), (second, (1 - p) * (1 - share))


def _draw_rules(random: Random) -> tuple[Rule, ...]:
    """Eight different pairs of operations. In either place every operation stands once or twice: rules that share an
    operation agree more often."""
    pairs = list(permutations(OPERATIONS, 2))
    while True:
        drawn = random.sample(pairs, len(RULES))
        counts = [sum(pair[place] == operation for pair in drawn) for place in (0, 1) for operation in OPERATIONS]
        if all(1 <= count <= 2 for count in counts):
            return tuple(Rule(name, *pair) for name, pair in zip(RULES, drawn, strict=True))
