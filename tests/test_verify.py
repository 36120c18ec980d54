"""Verification: what counts as right, what happens when a worker hangs or dies, and rewards of the user's own."""

from __future__ import annotations

import asyncio
import json
import random
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mel_fast import answers
from mel_fast.pool import Pool
from mel_fast.types import Prompt
from mel_fast.verify import RewardError, Verdict, Verifier, VerifyConfig

DATA = Path(__file__).parents[2] / "shared" / "data"
PROMPT = Prompt(id="p1", question="q", answer="a")
RIGHT = Verdict(1.0, True, "")
WRONG = Verdict(0.0, False, "")
TIMEOUT = Verdict(0.0, False, "timeout")
TOWER = r"\boxed{9^{9^{9^{9}}}}"


@pytest.fixture(scope="module")
def verifier() -> Iterator[Verifier]:
    with Verifier() as verifier:
        yield verifier


def judge(verifier: Verifier, *pairs: tuple[str, str]) -> list[Verdict]:
    return verifier.score_many((response, gold, PROMPT) for response, gold in pairs)


def rows(name: str) -> list[dict[str, Any]]:
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- what counts as right ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "gold", "right"),
    [
        (r"so $\boxed{\left(3, \frac{\pi}{2}\right)}$", r"\left( 3, \frac{\pi}{2} \right)", True),
        (r"so $\boxed{(\frac{\pi}{2}, 3)}$", r"\left( 3, \frac{\pi}{2} \right)", False),
        (r"\boxed{-q + p}", "p - q", True),
        (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}", True),
        (r"\boxed{\text{Carla}}", r"\text{Evelyn}", False),
        (r"\boxed{10\%}", r"10\%", True),
        (r"\boxed{[-2, 7]}", r"x \in [-2,7]", True),
        (r"\boxed{(-2, 7]}", r"x \in [-2,7]", False),
        (r"\boxed{5\text{ cm}}", "5", True),
        (r"\boxed{\begin{pmatrix} 1 \\ 0.5 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 1/2 \end{pmatrix}", True),
        (r"\boxed{-2, 1}", "1,-2", True),
        (r"\boxed{1}", "1,-2", False),
        (r"$\boxed{1}$ and $\boxed{-2}$", "1,-2", True),
        (r"\boxed{1,234}", "1234", True),
        (r"\boxed{03}", "3", True),
        (r"first $\boxed{4}$. No, it must be $\boxed{5}$", "5", True),
        (r"the answer is 7, that is \boxed{5}", "5", True),
        (r"\fbox{5}", "5", True),
        (r"\boxed{A = 5\text{ cm}^2}", "5", True),
    ],
)
def test_mathematics(verifier: Verifier, response: str, gold: str, right: bool) -> None:
    assert judge(verifier, (response, gold)) == [RIGHT if right else WRONG]


@pytest.mark.parametrize(
    ("last_line", "gold"),
    [
        ("Answer: 34", "34"),
        ("**Answer:** 34", "34"),
        ("Final Answer: $34$.", "34"),
        ("The final answer: 34.", "34"),
        (r"Answer: \boxed{34}", "34"),
        ("Answer: 34 apples", "34"),
        ("Answer: it is 34", "34"),
        (r"Answer: 3\sqrt{2}", r"3\sqrt{2}"),
        ("Answer: (1, 2)", "(1,2)"),
        ("Answer: x = 1 or x = -2", "1,-2"),
        ("Answer: Evelyn", r"\text{Evelyn}"),
        ("Answer: $18.90", r"\$18.90"),
        ("Answer: 34\n\n", "34"),
    ],
)
def test_answer_on_the_last_line(verifier: Verifier, last_line: str, gold: str) -> None:
    response = r"We get 7 and \boxed{8} on the way." + "\n" + last_line
    assert judge(verifier, (response, gold), (response, "7"), (response, "8")) == [RIGHT, WRONG, WRONG]


def test_an_answer_must_be_marked_as_one(verifier: Verifier) -> None:
    unmarked = [("I do not know.", "5"), ("", "5"), ("the sum is 5", "5"), ("It is $5$.", "5"), (r"5 \boxed{}", "5")]
    assert judge(verifier, *unmarked) == [Verdict(0.0, False, "no answer")] * 5
    with Verifier(VerifyConfig(anywhere=True)) as lenient:
        assert [v.correct for v in judge(lenient, *unmarked)] == [False, False, True, True, False]


@pytest.mark.parametrize(
    "response",
    [
        "Answer: possibly 5, else 6",
        r"\boxed{5} though the answer is 6",
        r"\boxed{\neq 5}",
        r"\boxed{\sum_{k=1}^{5} 1}",
        r"\boxed{7\boxed{5}}",
        " or ".join(rf"\boxed{{{n}}}" for n in range(9)),
        rf"\boxed{{{'0' * 2000}5}}",
    ],
)
def test_what_is_not_one_answer_is_unclear(verifier: Verifier, response: str) -> None:
    assert judge(verifier, (response, "5")) == [Verdict(0.0, False, "unclear")]


def test_an_answer_counts_wherever_its_box_stands(verifier: Verifier) -> None:
    early = r"\boxed{\frac12}" + " and so on" * 10_000
    late = "1 " * 20_000 + r"\boxed{\frac12}"
    assert judge(verifier, (early, "0.5"), (late, "0.5")) == [RIGHT, RIGHT]


# --- the fast path ----------------------------------------------------------------------------------------------------

_PIECES = [
    "So the answer is ", "The final answer is $8$. ", "I hope it is correct. ", "$", "$$", r"\[", r"\]", "{", "}", "%",
    " and ", ", ", " 12 ", "-7", "= ", "\n", "Answer: ", "Answer: 12", "**Answer:** -3.", "answer", r"\text{cm}", " m ",
    "^2", "^{2}", r"\frac{1}{2}", "1,234", r"\\ ", r"\fbox{3}", r"\boxed{9}", r"\left(", "`", "#### 18",
]  # fmt: skip
_TEXTS = st.lists(st.sampled_from(_PIECES), max_size=6).map("".join)
_NUMBERS = st.one_of(
    st.integers(-30, 30).map(str),
    st.integers(-(10**20), 10**20).map(str),
    st.sampled_from(["-0", "+5", "05", "007", "1,000", "1000", "12", "5.0", " 12 "]),
)


@settings(max_examples=600, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(before=_TEXTS, number=_NUMBERS, after=_TEXTS, gold=st.none() | _NUMBERS)
def test_the_fast_path_agrees_with_math_verify(before: str, number: str, after: str, gold: str | None) -> None:
    response, gold = f"{before}\\boxed{{{number}}}{after}", gold or number
    answer, reason = answers.stated(response, 10_000)
    fast = answers.same_integer(answer, gold)
    assert fast is None or (float(fast), reason) == answers.compare(answer, gold)


def test_the_fast_path_decides_plain_integers_and_nothing_else() -> None:
    decided = {
        r"\boxed{12}": True, r"\boxed{-12}": False, "Answer: 12": True, "Answer: $13$.": False, r"$\boxed{ 12 }$": True,
        r"\boxed{012}": None, r"\boxed{+12}": None, r"\boxed{1,2}": None, r"\boxed{12.0}": None, "it is 12": None,
        r"\boxed{12} \boxed{12}": None,
    }  # fmt: skip
    assert {response: answers.same_integer(answers.stated(response, 100)[0], "12") for response in decided} == decided
    assert answers.same_integer(r"\boxed{12}", "12.0") is None


def test_degenerate_text_does_not_hold_up_the_event_loop() -> None:
    for text in (
        "Answer: a" + "*" * 50_000 + "b",
        "*" * 50_000 + "answer",
        "Answer" + " " * 50_000 + "b",
        "Answer: " + r"\( 1 " * 50_000,
        "Answer: " + "1 or " * 50_000,
        "\\boxed{" * 20_000,
        "\\boxed{" * 20_000 + "}" * 20_000,
        r"\boxed{1} or " * 20_000,
        r"\boxed{1.5} " + "the answer is " * 20_000,
    ):
        start = time.thread_time()  # not the clock's: the machine may be busy
        assert answers.same_integer(answers.stated(text, 2000)[0], "12") is None
        assert time.thread_time() - start < 2  # minutes, if it were not linear


def test_plain_integers_start_no_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mel_fast.pool.Pool.run", unused)
    assert judge(Verifier(), (r"\boxed{3}", "3"), (r"\boxed{4}", "3")) == [RIGHT, WRONG]


def test_the_same_answer_to_the_same_question_is_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with Verifier(VerifyConfig(workers=1, timeout_s=0.1)) as verifier:
        first = judge(verifier, (r"so \boxed{\frac12}", "0.5"), (TOWER, "0.5"))
        monkeypatch.setattr("mel_fast.pool.Pool.run", unused)
        assert judge(verifier, (r"or \boxed{\frac12}", "0.5"), (TOWER, "0.5")) == first == [RIGHT, TIMEOUT]


async def unused(self: Pool, *call: object) -> None:
    raise AssertionError("a worker was asked")


# --- workers that hang or die -----------------------------------------------------------------------------------------


def test_a_hung_answer_scores_zero_and_the_rest_goes_on() -> None:
    with Verifier(VerifyConfig(workers=1, timeout_s=1.0)) as verifier:
        fine = (r"\boxed{\frac12}", "0.5")
        assert judge(verifier, fine, (TOWER, "7"), fine, (TOWER, "8"), fine) == [RIGHT, TIMEOUT, RIGHT, TIMEOUT, RIGHT]


def test_nobody_waits_for_a_hung_answer() -> None:
    async def run() -> list[str]:
        order: list[str] = []

        async def one(response: str, gold: str) -> None:
            await verifier.score(response, gold, PROMPT)
            order.append(gold)

        await asyncio.gather(one(TOWER, "7"), one(TOWER, "8"), *(one(r"\boxed{\frac12}", f"0.{n}") for n in range(50)))
        return order

    with Verifier(VerifyConfig(workers=1, timeout_s=2.0)) as verifier:
        order = asyncio.run(run())
    assert min(order.index("7"), order.index("8")) >= 40  # on a very busy machine a few may be tried twice


def test_an_answer_that_takes_long_is_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mel_fast.verify.PATIENCE_S", 0.01)  # a comparison cannot be that fast
    product = "".join(f"(x+{n})" for n in range(1, 8))
    with Verifier(VerifyConfig(workers=1, timeout_s=30.0)) as verifier:
        assert judge(verifier, (rf"\boxed{{{product}(x^2-1)}}", f"{product}(x+1)(x-1)")) == [RIGHT]


def test_large_numbers_of_earlier_answers_take_no_room_from_later_ones() -> None:
    """sympy remembers each of them."""
    large = [(rf"\boxed{{2^{{{10**8 + n}}}}}", "0.5") for n in range(3)]
    with Verifier(VerifyConfig(workers=1, memory_mib=160)) as verifier:
        assert judge(verifier, *large, (r"\boxed{\frac12}", "0.5"), *large[:1]) == [WRONG, WRONG, WRONG, RIGHT, WRONG]


def test_the_event_loop_stays_free_while_answers_are_compared() -> None:
    async def run() -> tuple[Verdict, int]:
        ticks = 0
        task = asyncio.create_task(verifier.score(TOWER, "7", PROMPT))
        while not task.done():
            ticks += 1
            await asyncio.sleep(0.01)
        return task.result(), ticks

    with Verifier(VerifyConfig(workers=1, timeout_s=0.5)) as verifier:
        verdict, ticks = asyncio.run(run())
    assert verdict.reason == "timeout"
    assert ticks > 25


# --- rewards of the user's own ----------------------------------------------------------------------------------------


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    def write(source: str) -> str:
        name = f"reward_{random.getrandbits(64):x}"
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source), encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)
        return name

    return write


def test_a_reward_function_sees_all_and_runs_in_the_main_thread(user_module: Callable[[str], str]) -> None:
    name = user_module("""
        import threading
        def score(response, answer, prompt):
            assert threading.current_thread() is threading.main_thread()
            return 0.5 * (response == "r") + 0.25 * (answer == "a") + 0.125 * (prompt.id == "p1")
        """)
    with Verifier(VerifyConfig(function=f"{name}:score", correct_at=0.8)) as verifier:
        assert judge(verifier, ("r", "a"), ("r", "b")) == [Verdict(0.875, True, ""), Verdict(0.625, False, "")]


def test_a_reward_function_that_hangs_or_kills_its_worker_scores_zero(user_module: Callable[[str], str]) -> None:
    name = user_module("""
        import os, time
        def score(response, answer, prompt):
            if response == "hang":
                time.sleep(60)
            if response == "die":
                os.abort()
            return 1
        """)
    with Verifier(VerifyConfig(workers=2, timeout_s=1.0, function=f"{name}:score", correct_at=0.0)) as verifier:
        verdicts = judge(verifier, ("hang", ""), ("ok", ""), ("die", ""), ("ok", ""), ("ok", ""))
    assert [v.reason for v in verdicts] == ["timeout", "", "crash", "", ""]
    assert [v.correct for v in verdicts] == [False, True, False, True, True]  # whatever `correct_at` is


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1 / 0", r"p1.*ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", r"p1.*SystemExit: 3"),
        ("raise KeyboardInterrupt", r"p1.*KeyboardInterrupt"),
        ("return 'good'", r"p1.*TypeError.*'good', not a number"),
        ("return '0.5'", r"p1.*TypeError.*'0.5', not a number"),
        ("return [1.0]", r"p1.*TypeError"),
        ("return 10 ** 400", r"p1.*OverflowError"),
        ("return -float('inf')", r"returned -inf.*p1.*finite"),
        ("return None", r"p1.*TypeError.*NoneType"),
        ("return float('nan')", r"returned nan.*p1.*finite"),
    ],
)
def test_a_bug_in_a_reward_function_stops_the_run(user_module: Callable[[str], str], body: str, message: str) -> None:
    name = user_module(f"def score(response, answer, prompt):\n    {body}")
    with (
        Verifier(VerifyConfig(workers=1, function=f"{name}:score")) as verifier,
        pytest.raises(RewardError, match=f"(?s){name}:score.*{message}"),
    ):
        judge(verifier, ("r", "a"))


def test_a_wrong_import_path_is_told_at_once(user_module: Callable[[str], str]) -> None:
    name = user_module("def score(response, answer, prompt): return 1\ndef narrow(response): return 1\nnumber = 3")
    broken = user_module("import json\nraise OSError('disk')")
    for path, message in {
        "no_colon": "module:function",
        "no_such_module:score": "No module named 'no_such_module'.*PYTHONPATH",
        f"{name}:scores": "has no 'scores'; did you mean 'score'",
        f"{name}:narrow": r"cannot be called with \(response, answer, prompt\)",
        f"{name}:number": "3 is not a callable",
        f"{broken}:score": "OSError: disk",
    }.items():
        with pytest.raises(ValueError, match=message):
            Verifier(VerifyConfig(function=path))


def test_unknown_and_senseless_settings_are_refused() -> None:
    for settings_ in ({"worker": 2}, {"workers": 0}, {"timeout_s": 0}):
        with pytest.raises(ValidationError):
            VerifyConfig(**settings_)  # pyright: ignore[reportArgumentType]


# --- real problems ----------------------------------------------------------------------------------------------------

SETS = ["math500", "aime24", "aime25", "amc23", "gsm8k_test"]


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("form", ["Hence it must be ${}$, as wanted.", "Hence.\nAnswer: {}"])
def test_every_gold_answer_is_right_for_itself(verifier: Verifier, name: str, form: str) -> None:
    golds = [row["answer"] for row in rows(name)]
    wrapped = [f"\\boxed{{{gold}}}" if "$" in form else gold for gold in golds]
    verdicts = judge(verifier, *((form.format(text), gold) for text, gold in zip(wrapped, golds, strict=True)))
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if verdict != RIGHT] == []


@pytest.mark.parametrize("name", SETS)
def test_another_problem_s_answer_is_wrong(verifier: Verifier, name: str) -> None:
    golds = [row["answer"] for row in rows(name)]
    # Degrees left out: 120 and 120^\circ are the same number, and are meant to be.
    bare = [gold.replace(r"^\circ", "").replace(" ", "") for gold in golds]
    draw = random.Random(0)
    pairs = [(a, b) for a, b in (draw.sample(range(len(golds)), 2) for _ in golds) if bare[a] != bare[b]]
    verdicts = judge(verifier, *((f"It is $\\boxed{{{golds[a]}}}$.", golds[b]) for a, b in pairs))
    assert [(golds[a], golds[b]) for (a, b), v in zip(pairs, verdicts, strict=True) if v != WRONG] == []


def test_recorded_solutions_get_their_recorded_verdicts(verifier: Verifier) -> None:
    recorded = rows("recorded_rollouts_math60")
    verdicts = judge(verifier, *((text, row["answer"]) for row in recorded for text in row["responses"]))
    scores = [score for row in recorded for score in row["scores"]]
    assert [v.correct for v in verdicts] == scores
    assert {v.reason for v in verdicts} == {""}
