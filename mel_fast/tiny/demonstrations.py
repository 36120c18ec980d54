"""Demonstrations for the warm start: they teach to solve, to reflect, to use a hint and to recall a rule, but not what
is right for the unsure topics.

Beliefs decide which rule a solution follows, so the model leaves the warm start with misconceptions. Reflections and
hints name rules drawn at random, so copying a rule from the context is learnt without a leak of the truth.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from mel_kernels import Stream

from mel_fast.prompts import Renderer
from mel_fast.tiny.config import WarmStartConfig
from mel_fast.tiny.texts import rule_heuristics, rule_reflection, slip_reflection, solution
from mel_fast.tiny.world import Problem, Rule, Slip, Topic, World
from mel_fast.types import Prompt, Sample, make_sample

Example = tuple[list[int], str]
"""Prompt ids and the response's text."""


def demonstration_batch(world: World, renderer: Renderer, step: int, config: WarmStartConfig) -> list[Sample]:
    """The demonstrations of one step of the warm start.

    The loss of a batch is the sum over kinds of weight * mean over its samples of the mean over its response tokens;
    the samples' weights carry all of that.

    Args:
        world: whose problems are demonstrated.
        renderer: makes the prompts, so that they are those that sampling will show.
        step: with the configuration's seed, decides every draw.
        config: how many of each kind, and what they contain.
    """
    teacher = _Teacher(world, renderer, config, Random(f"demonstrations {config.seed} {step}"))
    kinds: list[tuple[Callable[[], Example], int, float]] = [
        (teacher.solve, config.solve, config.solve_weight),
        (teacher.reflect, config.reflect, config.reflect_weight),
        (teacher.replay, config.replay, config.replay_weight),
        (teacher.recall, config.recall, config.recall_weight),
        (teacher.critique, config.critique, config.critique_weight),
    ]
    samples: list[Sample] = []
    for make, count, weight in kinds:
        for prompt_ids, response in (make() for _ in range(count)):
            target = renderer.answer(response)
            per_token = weight / (count * len(target))
            samples.append(make_sample(prompt_ids, target, Stream.NLL, per_token, "demonstration"))
    return samples


class _Teacher:
    """Draws demonstrations. Every method returns the prompt's ids and the response."""

    def __init__(self, world: World, renderer: Renderer, config: WarmStartConfig, random: Random) -> None:
        self.world, self.renderer, self.config, self.random = world, renderer, config, random

    def solve(self) -> Example:
        problem = self.problem()
        return self.renderer.solve(prompt(problem)), solution(problem, self.belief(problem.topic))

    def recall(self) -> Example:
        problem = self.problem()
        return self.renderer.recall(prompt(problem)), rule_heuristics(problem.topic, self.belief(problem.topic))

    def reflect(self) -> Example:
        """The response is written on a pair of attempts that differ in the rule or by a slip; both are random."""
        problem, wrong, right = self.contrast()
        if self.chance(self.config.slip):
            slip = self.slip()
            attempts = solution(problem, right, slip), solution(problem, right)
            response = slip_reflection(problem, right, slip)
        else:
            attempts = solution(problem, wrong), solution(problem, right)
            named = right
            if self.chance(self.config.mistaken):
                wrong, named = right, wrong
            elif self.chance(self.config.closed_book) and (believed := self.belief(problem.topic)) is not wrong:
                named = believed
            response = rule_reflection(problem.topic, wrong, named)
        return self.renderer.reflect(prompt(problem), *map(self.renderer.answer, attempts)), response

    def critique(self) -> Example:
        """On a wrong attempt alone: the response can only recommend what is believed, if that is another rule."""
        problem, wrong, right = self.contrast()
        if self.chance(self.config.slip):
            slip = self.slip()
            attempt, response = solution(problem, right, slip), slip_reflection(problem, right, slip)
        else:
            others = [rule for rule, _ in problem.topic.belief if rule is not wrong]
            named = (
                believed
                if (believed := self.belief(problem.topic)) is not wrong
                else self.random.choice(others or self.world.rules)
            )
            attempt, response = solution(problem, wrong), rule_reflection(problem.topic, wrong, named)
        return self.renderer.critique(prompt(problem), self.renderer.answer(attempt)), response

    def replay(self) -> Example:
        """A hint on the question's topic is followed, right or wrong. Any other note is ignored."""
        problem = self.problem()
        followed = self.belief(problem.topic)
        if self.chance(self.config.slip):
            before = Problem(problem.topic, self.random.choice(self.world.numbers))
            note = slip_reflection(before if self.chance(self.config.new_numbers) else problem, followed, self.slip())
        else:
            wrong, named = self.random.sample(self.world.rules, 2)
            about = self.random.choice(self.world.topics) if self.chance(self.config.other_topic) else problem.topic
            note = rule_reflection(about, wrong, named)
            same = about is problem.topic or (about.guild != "" and about.guild == problem.topic.guild)
            followed = named if same else followed
        return self.renderer.replay(prompt(problem), self.renderer.answer(note)), solution(problem, followed)

    def problem(self) -> Problem:
        return Problem(self.random.choice(self.world.topics), self.random.choice(self.world.numbers))

    def belief(self, topic: Topic) -> Rule:
        rules, probabilities = zip(*topic.belief, strict=True)
        return self.random.choices(rules, probabilities)[0]

    def contrast(self) -> tuple[Problem, Rule, Rule]:
        """A problem, and two rules that disagree about it as a wrong and a right attempt do."""
        while True:
            problem = self.problem()
            wrong, right = self.random.sample(self.world.rules, 2)
            if problem.answer_by(wrong) != problem.answer_by(right):
                return problem, wrong, right

    def slip(self) -> Slip:
        return Slip(self.random.choice((0, 1)), self.random.randint(1, 9))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability


def prompt(problem: Problem) -> Prompt:
    return Prompt(id="", question=problem.question, answer=problem.answer, source=problem.topic.family.name)
