"""Servers die, fall silent or come back with other weights: the work is done all the same, once and by the right
weights."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence

import pytest
from forwarder import Forwarder
from sglang_support import (
    Attach,
    assert_sampled_by,
    generate,
    policy,
    requests,
    wait_until,
    weights,
    while_generating,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mel_fast.errors import EngineError
from mel_fast.rollout.sglang.engine import SGLangEngine
from mel_fast.types import Completion, Request

VERSION = 5


@pytest.fixture
def model(engine: SGLangEngine, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The newest policy, which both servers serve."""
    wait_until(lambda: ready(engine) == 2)
    model = policy(tokenizer, VERSION)
    engine.load(weights(model), VERSION)
    engine.take_metrics()
    return model


def test_when_one_server_is_killed_its_sessions_move_and_it_comes_back_with_the_newest_weights(
    engine: SGLangEngine, model: PreTrainedModel
) -> None:
    sessions = long_sessions()
    done = while_generating(engine, sessions, lambda: kill(engine, 0))
    assert_all_done_by(model, sessions, done)
    assert ready(engine) == 1, "the work waited for the restart"
    metrics = engine.take_metrics()
    assert metrics["engine/lost"] == 1
    assert metrics["engine/moved"] + metrics["engine/retried"] > 0
    wait_until(lambda: ready(engine) == 2)
    again = [[request] for request in requests(4)]
    assert_all_done_by(model, again, generate(engine, *again))
    assert engine.take_metrics()["engine/moved"] == 0


def test_a_server_that_hangs_is_found_and_restarted_and_its_sessions_move(
    engine: SGLangEngine, model: PreTrainedModel
) -> None:
    sessions, process = long_sessions(), engine.processes[1]
    hung = process.pid
    done = while_generating(engine, sessions, lambda: os.killpg(hung, signal.SIGSTOP))
    assert_all_done_by(model, sessions, done)
    assert engine.take_metrics()["engine/lost"] == 1
    wait_until(lambda: ready(engine) == 2)
    assert process.pid != hung


def test_when_all_servers_are_killed_the_work_waits_for_them_and_goes_on(
    engine: SGLangEngine, model: PreTrainedModel
) -> None:
    sessions = long_sessions()

    assert_all_done_by(model, sessions, while_generating(engine, sessions, lambda: kill(engine, 0, 1)))
    assert engine.take_metrics()["engine/lost"] == 2


@pytest.mark.soak
@pytest.mark.parametrize("way", ["disk", "tensor", "group"])
def test_a_server_killed_during_a_publication_keeps_nobody_from_the_new_weights_and_gets_the_newest_later(
    engine: SGLangEngine,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
) -> None:
    monkeypatch.setattr(engine.publisher, "config", engine.config.model_copy(update={"weights": way}))
    engine.load(weights(model), 6)  # a group is there already
    new = policy(tokenizer, 7)

    def dying() -> Iterator[tuple[str, Tensor]]:
        """The server has begun with the publication; then it takes its part of it no further, and ends."""
        os.killpg(engine.processes[1].pid, signal.SIGSTOP)
        threading.Timer(1, kill, [engine, 1]).start()
        yield from weights(new)

    sessions = [[request] for request in requests(4)]
    engine.load(dying(), 7)
    assert_all_done_by(new, sessions, generate(engine, *sessions), version=7)
    engine.load(weights(model), 8)
    assert ready(engine) == 1, "the work waited for the restart"
    assert_all_done_by(model, sessions, generate(engine, *sessions), version=8)
    wait_until(lambda: ready(engine) == 2)
    assert engine.take_metrics()["engine/lost"] == (2 if way == "group" else 1), "one that is lost breaks the group"
    assert_all_done_by(model, sessions, generate(engine, *sessions), version=8)
    engine.load(weights(new), 9)
    assert_all_done_by(new, sessions, generate(engine, *sessions), version=9)
    engine.publisher.leave()


def test_a_server_that_a_killed_run_has_left_in_mid_publication_is_of_use_to_the_next(
    engine: SGLangEngine, model: PreTrainedModel, attach: Attach, tokenizer: PreTrainedTokenizerBase
) -> None:
    left = engine.servers[0].client
    engine._call(left.post("/pause_generation", 30, mode="retract"))
    engine._call(left.post("/begin_weight_update", 30))
    attached = attach(weights="tensor", recovery_copy=False)
    new, asked = policy(tokenizer, 6), requests(2)
    attached.load(weights(new), 6)
    assert_sampled_by(new, asked, generate(attached, asked)[0])
    assert attached.take_metrics()["engine/lost"] == 0


def test_a_broken_connection_is_tried_again(engine: SGLangEngine, model: PreTrainedModel, attach: Attach) -> None:
    with Forwarder(engine.processes[0].url) as line:
        attached = attach(urls=[line.url])
        attached.load(weights(model), VERSION)
        sessions = long_sessions()
        assert_all_done_by(model, sessions, while_generating(attached, sessions, line.cut))
        metrics = attached.take_metrics()
        assert metrics["engine/retried"] > 0
        assert metrics["engine/lost"] == 0


def test_an_attached_server_that_was_restarted_gets_the_newest_weights_before_it_is_asked_again(
    engine: SGLangEngine, model: PreTrainedModel, attach: Attach, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Another server with other weights behind the same address."""
    with Forwarder(engine.processes[0].url) as line:
        attached = attach(urls=[line.url])
        new = policy(tokenizer, 8)
        attached.load(weights(new), 8)
        sessions = long_sessions()

        def restart() -> None:
            line.target = engine.processes[1].url
            line.cut()

        done = while_generating(attached, sessions, restart)
        assert_all_done_by(new, sessions, done, version=8)
        assert attached.take_metrics()["engine/lost"] == 1


def test_when_servers_are_lost_too_often_the_run_ends_and_says_why(engine: SGLangEngine) -> None:
    wait_until(lambda: ready(engine) == 2)
    for server in engine.servers:
        server.config = server.config.model_copy(update={"max_restarts": server.losses})
    times = engine.servers[0].losses + 1

    with pytest.raises(
        EngineError, match=rf"no rollout server is left; server 0: lost {times} times.*its process ended"
    ):
        while_generating(engine, long_sessions(), lambda: kill(engine, 0, 1))


def long_sessions() -> list[list[Request]]:
    """Four sessions of two requests, long enough to be under way for seconds."""
    asked = requests(8, limit=400, length=60)
    return [asked[index : index + 2] for index in range(0, 8, 2)]


def assert_all_done_by(
    model: PreTrainedModel,
    sessions: Sequence[Sequence[Request]],
    done: Sequence[Sequence[Completion]],
    version: int = VERSION,
) -> None:
    assert [len(asked) for asked in sessions] == [len(completions) for completions in done]
    for asked, completions in zip(sessions, done, strict=True):
        assert_sampled_by(model, asked, completions)
        for request, completion in zip(asked, completions, strict=True):
            assert completion.versions == [(version, len(completion.output_ids))]
            assert completion.finish_reason == "stop" or len(completion.output_ids) == request.max_new_tokens


def ready(engine: SGLangEngine) -> int:
    return sum(server.ready.is_set() for server in engine.servers)


def kill(engine: SGLangEngine, *indices: int) -> None:
    for index in indices:
        os.killpg(engine.processes[index].pid, signal.SIGKILL)
