"""Servers die, fall silent or come back with other weights: the work is done all the same, once and by the right
weights."""

from __future__ import annotations

import os
import signal
import time
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

    def kill_both() -> None:
        kill(engine, 0)
        kill(engine, 1)

    assert_all_done_by(model, sessions, while_generating(engine, sessions, kill_both))
    assert engine.take_metrics()["engine/lost"] == 2


def test_a_server_killed_during_a_publication_by_group_does_not_keep_the_other_from_the_new_weights(
    engine: SGLangEngine, model: PreTrainedModel, attach: Attach, tokenizer: PreTrainedTokenizerBase
) -> None:
    attached = attach(servers=2, weights="group", start_timeout_s=3, max_restarts=1)
    attached.load(weights(model), 6)  # through a group of both
    new = policy(tokenizer, 7)

    def dying() -> Iterator[tuple[str, Tensor]]:
        kill(engine, 1)
        yield from weights(new)

    attached.load(dying(), 7)
    asked = [[request] for request in requests(4)]
    done = generate(attached, *asked)
    assert_sampled_by(new, [one for [one] in asked], [one for [one] in done])
    assert {version for [one] in done for version, _ in one.versions} == {7}
    wait_until(lambda: attached.servers[1].gone.is_set())
    attached.load(weights(model), 8)  # through a group of those that are left
    done = generate(attached, *asked)
    assert_sampled_by(model, [one for [one] in asked], [one for [one] in done])
    assert attached.take_metrics()["engine/servers"] == 1


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
    with pytest.raises(EngineError, match=r"no rollout server is left; server 0: lost 4 times.*its process ended"):
        while_generating(engine, long_sessions(), lambda: kill_until_gone(engine))


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


def kill(engine: SGLangEngine, index: int) -> None:
    os.killpg(engine.processes[index].pid, signal.SIGKILL)


def kill_until_gone(engine: SGLangEngine) -> None:
    while not all(server.gone.is_set() for server in engine.servers):
        for index, server in enumerate(engine.servers):
            if server.ready.is_set():
                kill(engine, index)
        time.sleep(0.1)
