"""Imported by the server that the verifier's workers are forked from, which has no other work.

What Math-Verify builds at first use (its patterns, the tables of its parser) takes a second or two. Built here, every
worker is born with it, also the replacement of a killed one.
"""

from __future__ import annotations

import logging

from mel_fast import answers

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timers are off
for _answer, _gold in (
    (r"\boxed{\frac{1}{2}}", "0.5"),
    (r"\boxed{x^2 - 3\sqrt{2}x}", "x(x - 4)"),
    (r"\boxed{\left(-\infty, \frac{\pi}{3}\right]}", "[1, 2)"),
    (r"\boxed{1} and \boxed{2}", r"\{1, 3\}"),
    (r"\boxed{x = 1 \text{ or } x = -2}", "1,-2"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}"),
    (r"\boxed{2 + 3i}", r"10\%"),
    (r"\boxed{\text{Evelyn}}", r"\sin(2^{10})"),
    ("Answer: it is 34 apples", "1,234"),
):
    answers.grade(_answer, _gold, 100)
