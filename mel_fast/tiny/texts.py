"""What is written in the world: solutions, reflections and heuristics, in short plain English.

Short, because every word costs a step of decoding; fixed sentences, because a model of half a million parameters has to
learn them within minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mel_fast.tiny.names import COLOURS, RULES
from mel_fast.tiny.world import FAMILIES, OPERATIONS, Problem, Rule, Slip, Topic

RULE_SLOT = "For {topic}, use"
"""How a solution begins: the next token is the name of a rule."""
SOLUTION = RULE_SLOT + " {rule}. {first}. {second}. So \\boxed{{{answer}}}."
TACIT_SOLUTION = "{first}. {second}. So \\boxed{{{answer}}}."
STEP = "{step.a} {step.operation} {step.b} is {step.result}"

RULE_REFLECTION = """Bifurcation: the choice of rule.
Critique: I used {wrong}, but {right} fits here.
Heuristics: {heuristics}"""
RECALL_SLOT = "When asked about {topic}, use"
"""How heuristics on a rule begin: the next token is its name."""
RULE_HEURISTICS = RECALL_SLOT + " {right}."

SLIP_REFLECTION = """Bifurcation: the {place} step.
Critique: I wrote that {wrong}, but it is {right}.
Heuristics: {heuristics}"""
SLIP_HEURISTICS = "When a step says {operation}, count it again."


def solution(problem: Problem, rule: Rule, slip: Slip | None = None) -> str:
    """A worked solution by any rule; right if it is the topic's and nothing slips."""
    topic, form = problem.topic, TACIT_SOLUTION if problem.topic.tacit else SOLUTION
    first, second = (STEP.format(step=step) for step in problem.steps(rule, slip))
    answer = problem.answer_by(rule, slip)
    return form.format(topic=topic.name, rule=rule.name, first=first, second=second, answer=answer)


def rule_heuristics(topic: Topic, rule: Rule) -> str:
    return RULE_HEURISTICS.format(topic=topic.guild or topic.name, right=rule.name)


def rule_reflection(topic: Topic, wrong: Rule, right: Rule) -> str:
    """A meta-experience that blames one rule and recommends another."""
    return RULE_REFLECTION.format(wrong=wrong.name, right=right.name, heuristics=rule_heuristics(topic, right))


def slip_reflection(problem: Problem, rule: Rule, slip: Slip) -> str:
    """A meta-experience on a step that went wrong under this rule."""
    step = problem.steps(rule, slip)[slip.step]
    return SLIP_REFLECTION.format(
        place=("first", "second")[slip.step],
        wrong=STEP.format(step=step),
        right=OPERATIONS[step.operation](step.a, step.b),
        heuristics=SLIP_HEURISTICS.format(operation=step.operation),
    )


def corpus(guilds: bool = False) -> Iterator[str]:
    """Texts with every word of every world (without or with guilds), in every place where it can stand. A tokenizer is
    built from them."""
    operations, names = list(OPERATIONS), list(RULES)
    rules = [Rule(name, operations[i % 5], operations[(i + 1) % 5]) for i, name in enumerate(names)]
    for family in FAMILIES:
        for index, name in enumerate(family.topics):
            rule, other = rules[index % 8], rules[(index + 1) % 8]
            topic = Topic(name, family, "sure", ((rule, 1.0),))
            problem = Problem(topic, (index % 10, (index + 3) % 10, (index + 6) % 10))
            slip = Slip(0 if index % 2 else 1, 1)
            yield problem.question
            yield solution(problem, rule, slip)
            yield rule_reflection(topic, other, rule)
            yield rule_heuristics(topic, rule)
            yield slip_reflection(problem, rule, slip)
            if guilds:
                topic = replace(topic, guild=f"{COLOURS[index % len(COLOURS)]} {family.name}")
                yield rule_heuristics(topic, rule)
