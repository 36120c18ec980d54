"""After weights are published, the servers sample from them and from nothing else."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sglang_support import (
    Attach,
    assert_sampled_by,
    generate,
    logprobs,
    policy,
    requests,
    weights,
    while_generating,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.rollout.sglang.transport import send_files

WAYS = ("disk", "tensor", "group")


@pytest.mark.parametrize("way", WAYS)
def test_every_server_samples_from_the_new_weights_and_from_no_old_prefix(
    attach: Attach, tokenizer: PreTrainedTokenizerBase, way: str
) -> None:
    engine = attach(servers=2, weights=way, bucket_mib=1)
    asked = requests(4)
    for version in (1, 2):  # the second time a group is there already
        generate(engine, *([request] for request in asked))  # their prefixes are cached now
        model = policy(tokenizer, version)
        engine.load(weights(model), version)
        done = [completions[0] for completions in generate(engine, *([request] for request in asked))]
        assert [c.cached_tokens for c in done] == [0] * len(asked)
        assert [c.versions for c in done] == [[(version, len(c.output_ids))] for c in done]
        assert_sampled_by(model, asked, done)
    assert engine.take_metrics() == pytest.approx(
        {"engine/lost": 0, "engine/moved": 0, "engine/retried": 0, "engine/impatient": 0, "engine/servers": 2}
    )


@pytest.mark.parametrize("way", WAYS)
def test_requests_under_way_go_on_with_the_new_weights_and_say_from_which_token(
    attach: Attach, tokenizer: PreTrainedTokenizerBase, way: str
) -> None:
    old, new = policy(tokenizer, 3), policy(tokenizer, 4)
    engine = attach(weights=way)
    engine.load(weights(old), 3)
    asked = [replace(request, max_new_tokens=400) for request in requests(6, length=30)]
    done = while_generating(engine, [asked], lambda: engine.load(weights(new), 4))[0]
    mixed = [c for c in done if len(c.versions) == 2]
    assert mixed, [c.versions for c in done]
    for request, completion in zip(asked, done, strict=True):
        assert sum(count for _, count in completion.versions) == len(completion.output_ids)
        start = 0
        for version, count in completion.versions:
            expected = logprobs(old if version == 3 else new, request, completion)[start : start + count]
            got = torch.tensor(completion.logprobs[start : start + count])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            start += count
    assert {version for completion in mixed for version, _ in completion.versions} == {3, 4}


def test_memory_can_be_released_between_the_last_answer_and_the_next_weights(
    attach: Attach, tokenizer: PreTrainedTokenizerBase
) -> None:
    engine = attach(servers=2, weights="tensor")
    engine.publisher.config = engine.config.model_copy(update={"urls": (), "release_memory": True})
    asked = requests(2)
    for version in (1, 2):
        model = policy(tokenizer, version)
        engine.load(weights(model), version)
        done = [completions[0] for completions in generate(engine, *([request] for request in asked))]
        assert_sampled_by(model, asked, done)
        engine.release()
        time.sleep(2)  # health is looked after every second: silence is right now
    engine.load(weights(policy(tokenizer, 3)), 3)
    assert engine.take_metrics()["engine/lost"] == 0


def test_a_server_that_holds_other_weights_than_its_peer_is_found_by_its_checksum_and_repaired(
    attach: Attach, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = attach(servers=2, weights="tensor")
    spoil_before_checksums(monkeypatch, engine, policy(tokenizer, 9), tmp_path / "other")
    model, asked = policy(tokenizer, 6), requests(4)
    engine.load(weights(model), 6)
    done = [completions[0] for completions in generate(engine, *([request] for request in asked))]
    assert_sampled_by(model, asked, done)
    assert [c.versions[0][0] for c in done] == [6] * 4


def test_servers_that_differ_and_cannot_be_repaired_end_the_run(
    attach: Attach, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = attach(servers=2, weights="tensor", recovery_copy=False)
    spoil_before_checksums(monkeypatch, engine, policy(tokenizer, 9), tmp_path / "other")
    with pytest.raises(EngineError, match="servers hold different weights of version 6"):
        engine.load(weights(policy(tokenizer, 6)), 6)
    with pytest.raises(EngineError, match=r"no rollout server is left.*recovery_copy=false"):
        generate(engine, requests(1))  # whoever goes on in spite of that gets no samples of unknown weights


def spoil_before_checksums(
    monkeypatch: pytest.MonkeyPatch, engine: SGLangEngine, other: PreTrainedModel, folder: Path
) -> None:
    """Once, the last server loads another model just before the checksums are compared."""
    other.save_pretrained(folder)
    compare, server = engine.publisher._verify, engine.servers[-1]

    async def spoil_and_compare() -> None:
        monkeypatch.undo()
        await send_files(server.client, folder, 6, 60)
        await compare()

    monkeypatch.setattr(engine.publisher, "_verify", spoil_and_compare)
