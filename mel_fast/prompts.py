"""Prompts as token ids, and the parser of a meta-experience.

Five prompts exist: *solve* (the question), *reflect* (C_retro of the paper: question, wrong solution, right solution),
*replay* (the meta-experience, then the question), *recall* (the question, asking for the rules alone) and, as a
control, *critique* (*reflect* without the right solution).

A template is split at its placeholders and every piece is tokenised by itself; the ids are then concatenated. So two
prompts that share their first pieces share their first token ids, which is what a prefix cache needs: text joined
before tokenisation may merge differently at a border. For the same reason everything common comes first in *reflect*.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from mel_fast.errors import InputError
from mel_fast.templates import PLACEHOLDERS, PromptConfig
from mel_fast.types import MetaExperience, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Renderer:
    """Turns problems and solutions into prompt ids, with one tokenizer and one set of templates.

    Args:
        tokenizer: a transformers tokenizer with an end-of-sequence token.
        config: the templates.

    Raises:
        InputError: the tokenizer has no eos token, or `chat: true` was asked of one without a chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: PromptConfig) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.chat and not has_template:
            raise InputError("prompts.chat is true but the tokenizer has no chat template; set prompts.chat=false")
        eos: Any = tokenizer.eos_token_id
        if eos is None:
            raise InputError("the tokenizer has no eos token, so no response could ever end")
        self.tokenizer = tokenizer
        self.config = config
        self.chat = has_template if config.chat is None else config.chat
        self._head, self._tail = self._frame()
        # What ends a response, the usual one first: under a chat template a turn may end otherwise than by the eos.
        turn_end = self._turn_end() if self.chat else None
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys((int(eos) if turn_end is None else turn_end, int(eos))))
        self._templates = {name: self._split(getattr(config, name)) for name in PLACEHOLDERS}

    def solve(self, prompt: Prompt) -> list[int]:
        if prompt.messages is None:
            return self._render("solve", question=prompt.question)
        contents = [message["content"] for message in prompt.messages]
        if not self.chat:
            return [*self._head, *self.plain("\n\n".join(contents))]
        text = self._chat_text(
            [{**message, "content": f"[[content {i}]]"} for i, message in enumerate(prompt.messages)]
        )
        pieces = re.split(r"\[\[content (\d+)\]\]", text)  # the template's, a content's number, the template's, ...
        return [
            token
            for index, piece in enumerate(pieces)
            for token in (self.plain(contents[int(piece)]) if index % 2 else self.encode(piece))
        ]

    def reflect(self, prompt: Prompt, wrong: Sequence[int], right: Sequence[int]) -> list[int]:
        """C_retro. `wrong` and `right` are output ids of trajectories; a trailing stop token is left out."""
        return self._render("reflect", question=prompt.question, wrong=self.body(wrong), right=self.body(right))

    def critique(self, prompt: Prompt, wrong: Sequence[int]) -> list[int]:
        return self._render("critique", question=prompt.question, wrong=self.body(wrong))

    def replay(self, prompt: Prompt, experience: Sequence[int]) -> list[int]:
        return self._render("replay", experience=self.body(experience), question=prompt.question)

    def recall(self, prompt: Prompt) -> list[int]:
        return self._render("recall", question=prompt.question)

    def answer(self, text: str) -> list[int]:
        """Ids of a complete response with this text, ended by the stop token."""
        return [*self.plain(text), self.stop_ids[0]]

    def body(self, output_ids: Sequence[int]) -> list[int]:
        ids = list(output_ids)
        return ids[:-1] if ids and ids[-1] in self.stop_ids else ids

    def opening(self, output_ids: Sequence[int]) -> list[int]:
        """The first tokens of a solution, until their text contains `prompts.opening_end`; all, if it never does."""
        end = self.decode(output_ids).find(self.config.opening_end)
        return list(output_ids) if end < 0 else list(output_ids[: self._tokens_of(output_ids, end + 1)])

    def heuristics(self, output_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """A well-formed meta-experience, parted where its heuristics begin. What stands behind them belongs to them."""
        at = heuristics_start(self.decode(output_ids))
        tokens = self._tokens_of(output_ids, at)
        return list(output_ids[:tokens]), list(output_ids[tokens:])

    def _tokens_of(self, output_ids: Sequence[int], characters: int) -> int:
        """How many of the first tokens it takes for a text of so many characters."""
        low, high = 0, len(output_ids)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(self.decode(output_ids[:middle])) >= characters else (middle + 1, high)
        return low

    def encode(self, text: str) -> list[int]:
        """For templates: the name of a special token is that token."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def plain(self, text: str) -> list[int]:
        """For what comes out of data: "<|im_end|>" in a question is text, and ends no turn."""
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))

    def decode(self, output_ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(self.body(output_ids), skip_special_tokens=False))

    def _render(self, name: str, **fields: str | list[int]) -> list[int]:
        ids = list(self._head)
        for kind, piece in self._templates[name]:
            if kind == "literal":
                ids += piece
            else:
                value = fields[kind]
                ids += self.plain(value) if isinstance(value, str) else value
        return ids + self._tail

    def _split(self, template: str) -> list[tuple[str, Any]]:
        pieces = re.split(r"\{(question|wrong|right|experience)\}", template)  # literal, name, literal, name, ...
        return [
            (piece, None) if index % 2 else ("literal", self.encode(piece))
            for index, piece in enumerate(pieces)
            if piece
        ]

    def _frame(self) -> tuple[list[int], list[int]]:
        """Ids before and after a user message: the chat template's, or the bare text's optional BOS."""
        if not self.chat:
            bos: Any = self.tokenizer.bos_token_id
            system = self.encode(self.config.system + "\n\n") if self.config.system else []
            return ([bos] if bos is not None and getattr(self.tokenizer, "add_bos_token", False) else []) + system, []
        mark = "[[content]]"
        head, _, tail = self._chat_text([{"role": "user", "content": mark}]).partition(mark)
        return self.encode(head), self.encode(tail)

    def _turn_end(self) -> int | None:
        """The special token that the chat template puts behind an assistant's message, if it does."""
        mark = "[[answer]]"
        messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        first = self.encode(text.rpartition(mark)[2])[:1]
        return first[0] if first and first[0] in self.tokenizer.all_special_ids else None

    def _chat_text(self, messages: list[dict[str, str]]) -> str:
        if self.config.system and messages[0]["role"] != "system":  # the data's own system message stands
            messages = [{"role": "system", "content": self.config.system}, *messages]
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


SECTIONS = {"bifurcation": "bifurcation", "critique": "critique", "heuristic": "heuristics"}
HEADING = re.compile(
    r"^[ \t#*>_\-\d.)(]*(?P<name>bifurcation|critique|heuristic)s?(?: point)?"
    r"(?:[ \t]*\([^)\n]{0,20}\))?(?:[ \t]*\d{1,2})?[ \t]*(?:[*_]+[ \t]*)?(?::|\r?$)[*_]*",
    re.IGNORECASE | re.MULTILINE,
)


def parse_experience(text: str, answer: str) -> tuple[MetaExperience | None, str]:
    """Reads (s*, C, H) out of a reflection.

    Args:
        text: what the policy wrote; anything up to a closing `</think>` is ignored.
        answer: the problem's gold answer, which the heuristics must not contain.

    Returns:
        The meta-experience and "", or None and the reason: "no bifurcation", "no critique", "no heuristics" or "leaks
        answer". What stands under a heading that comes up again is added to the section.
    """
    text = text.rpartition("</think>")[2]
    found: dict[str, str] = {}
    headings = list(HEADING.finditer(text))
    for heading, following in zip_longest(headings, headings[1:]):
        name = SECTIONS[heading["name"].lower()]
        section = text[heading.end() : following.start() if following else None].strip()
        found[name] = "\n".join(filter(None, (found.get(name), section)))
    for name in SECTIONS.values():
        if not found.get(name):
            return None, f"no {name}"
    if leaks(answer, found["heuristics"]):
        return None, "leaks answer"
    return MetaExperience(found["bifurcation"], found["critique"], found["heuristics"]), ""


def heuristics_start(text: str) -> int:
    """Where the heuristics begin, in a reflection that `parse_experience` can read: behind the first of the headings of
    heuristics that follow all other sections, or behind their last one when another section ends the text."""
    offset = len(text) - len(text.rpartition("</think>")[2])
    headings = list(HEADING.finditer(text[offset:]))
    others = [index for index, heading in enumerate(headings) if heading["name"].lower() != "heuristic"]
    last = headings[others[-1] + 1 :]
    chosen = last[0] if last else [heading for heading in headings if heading["name"].lower() == "heuristic"][-1]
    return offset + chosen.end()


def leaks(answer: str, heuristics: str) -> bool:
    """Whether the answer stands in the text as a word of its own. A single character ("2", "x") stands in many an
    innocent rule, so it counts only where it is given as a result: boxed, or behind an equals sign or the words "answer
    is"."""
    bare = answer.strip().strip("$").strip()
    if not bare:
        return False
    before = r"(?<![\w.])" if len(bare) > 1 else r"(?:boxed\s*\{|=|answer\s+is\b|answer\s*:)(?:[\s$*]|\\\()*"
    return re.search(rf"{before}{re.escape(bare)}(?!\w|\.\d)", heuristics, re.IGNORECASE) is not None
