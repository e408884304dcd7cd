"""Traces of requests, and their replay."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from deepseek_optimizer.errors import DataError
from deepseek_optimizer.tune.replay import replay
from deepseek_optimizer.tune.traces import BUILT_IN, TraceRequest, describe, prompts, read_trace, shortened


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in(name):
    trace = BUILT_IN[name]()
    assert trace == BUILT_IN[name]() and [r.at for r in trace] == sorted(r.at for r in trace)
    assert all(0 <= r.shared_tokens <= r.prompt_tokens and r.new_tokens > 0 for r in trace)
    tokens = prompts(trace, list, list(range(5000)), 100)
    assert [len(prompt) for prompt in tokens] == [r.prompt_tokens for r in trace]
    for group in {r.group for r in trace}:
        members = [(prompt, r.shared_tokens) for prompt, r in zip(tokens, trace, strict=True) if r.group == group]
        longest = max(members, key=lambda one: one[1])[0]
        assert all(prompt[:shared] == longest[:shared] for prompt, shared in members)
    assert describe(trace)["requests"] == len(trace)
    small = shortened(trace, 64)
    assert all(r.prompt_tokens + r.new_tokens <= 64 and 0 <= r.shared_tokens <= r.prompt_tokens for r in small)
    assert all(0 <= t < 100 for prompt in prompts(small, list, [], 100) for t in prompt)


def test_files(tmp_path):
    file = tmp_path / "t.jsonl"
    lines = [{"at": 5, "prompt_tokens": 10, "new_tokens": 3}, {"at": 3.5, "prompt": "Hello", "new_tokens": 2}]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    trace = read_trace(file)
    assert trace == (TraceRequest(0.0, 1, 2, prompt="Hello"), TraceRequest(1.5, 10, 3))
    assert prompts(trace, lambda text: [len(text)], [], 50)[0] == [5]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "there are no requests"),
        ("nonsense", "line 1: not valid JSON"),
        ("[1]", "line 1: must be a JSON object"),
        ('{"prompt_tokens": 5}', "new_tokens: must be a whole number of at least 1"),
        ('{"prompt_tokens": 0, "new_tokens": 1}', "prompt_tokens: must be a whole number"),
        ('{"prompt_tokens": true, "new_tokens": 1}', "prompt_tokens: must be a whole number"),
        ('{"at": NaN, "prompt_tokens": 1, "new_tokens": 1}', "at: must be a number of seconds"),
        ('{"prompt_tokens": 1, "new_tokens": 1, "shared_tokens": 2}', "shared_tokens: must be at most prompt_tokens"),
        ('{"prompt": 3, "new_tokens": 1}', "prompt: must be a text"),
    ],
)
def test_wrong_files(tmp_path, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text(line)
    with pytest.raises(DataError) as error:
        read_trace(file)
    assert message in str(error.value)


class PretendedEngine:
    """One token a step for each request, 10 ms a step; a prompt takes one step."""

    def __init__(self):
        self.core, self.now, self.running, self.memory, self.steps = self, 0.0, {}, self, 0

    @property
    def idle(self):
        return not self.running

    @property
    def used_bytes(self):
        return 100 * len(self.running)

    def add(self, request, arrived):
        assert arrived <= self.now
        self.running[request.id] = request.sampling.max_tokens

    def step(self):
        from deepseek_optimizer.engine.request import Output

        self.now += 0.01
        outputs = []
        for id in list(self.running):
            self.running[id] -= 1
            ended = not self.running[id]
            outputs.append(Output(request_id=id, token_ids=[1], finish="length" if ended else None))
            if ended:
                del self.running[id]
        return outputs


def test_replay_by_hand():
    engine = PretendedEngine()

    def sleep(seconds):
        engine.now += seconds

    trace = (TraceRequest(0.0, 5, 2), TraceRequest(0.0, 5, 4), TraceRequest(1.0, 10, 1))
    found = replay(engine, nullcontext, trace, [[1] * 5, [1] * 5, [1] * 10], clock=lambda: engine.now, sleep=sleep)
    assert found.first_s == pytest.approx(0.01, abs=0.002)
    assert found.latency_s == pytest.approx((0.02 + 0.04 + 0.01) / 3, abs=0.002)
    assert found.tok_s == pytest.approx(27 / 1.01, rel=0.02)
    assert found.memory_bytes == 200  # of the first two, after a step
