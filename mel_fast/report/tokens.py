"""Texts of token ids, for the ids that a report shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mel_fast.report.runs import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Vocabulary:
    """The tokenizer of a run, if it can be had: from the run's exported model or the model it started from, never from
    the network. `note` says why there is none."""

    def __init__(self, run: Run) -> None:
        self.tokenizer, self.note = _load(run)
        self._places: dict[int, int] = {}

    def places(self, ids: Iterable[int]) -> list[int]:
        """The ids as places in `table`, which grows by those that are new."""
        return [self._places.setdefault(int(i), len(self._places)) for i in ids]

    def table(self) -> dict[str, Any]:
        """Every id seen, and its text when there is a tokenizer."""
        ids = list(self._places)
        return {"ids": ids, "texts": None if self.tokenizer is None else self._texts(ids), "note": self.note}

    def decode(self, ids: Sequence[int]) -> str:
        """As `Renderer.decode` does, but for the stop token."""
        assert self.tokenizer is not None
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """Each id decoded behind another one: at the start of a text some tokenizers swallow a blank. A part of a
        character is shown in the tokenizer's own spelling."""
        assert self.tokenizer is not None
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        start = len(self.decode(anchor))
        texts = [self.decode([*anchor, i])[start:] for i in ids]
        return [
            f"<{self.tokenizer.convert_ids_to_tokens(i)}>" if "\ufffd" in text else text
            for i, text in zip(ids, texts, strict=True)
        ]


def _load(run: Run) -> tuple[PreTrainedTokenizerBase | None, str]:
    from transformers import AutoTokenizer  # slow to import

    start = run.setting("model.path")
    for path in (str(run.path / "model"), start):
        if path:
            try:
                return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False), ""
            except (OSError, ValueError, TypeError, KeyError):  # what transformers raises for a folder without one
                continue
    places = "the run's model/ (written at its end)" + (f" or in {start}" if start else "")
    return None, f"Token ids are shown in place of texts: there is no tokenizer in {places}."
