"""Many clients on one event loop: every request gets exactly one correct answer, even if clients cancel or read slowly."""

import asyncio
import random

import pytest

from deepseek_optimizer import CheckpointChangedError, EngineBusyError, EngineDeadError, RequestError
from deepseek_optimizer.engine.async_engine import AsyncEngine, merged
from deepseek_optimizer.engine.request import Output, Request, SamplingParams, TokenLogprob
from support.mock_model import blocks_in_use, expected, make_core

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def started(**options):
    """Runs a coroutine function with a started engine, which must be empty afterwards."""

    def decorate(test):
        def run():
            async def main():
                engine = AsyncEngine(make_core(**options), "mock")
                await engine.start()
                try:
                    await asyncio.wait_for(test(engine), 60)
                finally:
                    await asyncio.wait_for(engine.close(), 10)
                assert engine.core.idle or not engine.alive
                assert blocks_in_use(engine.core) == 0 or engine._dead
                assert not engine._answers and engine.admitted == 0

            asyncio.run(main())

        run.__name__, run.__doc__ = test.__name__, test.__doc__
        return run

    return decorate


async def whole(answers):
    tokens, text, last = [], "", None
    async for output in answers:
        tokens += output.token_ids
        text += output.text
        last = output
    return tokens, text, last


@started(batch_size_range=(1, 2), max_waiting=1)
async def test_a_client_at_its_limit_does_not_block_others(engine):
    own = [engine.admit(client="a") for _ in range(3)]
    with pytest.raises(EngineBusyError, match="3 requests"):
        engine.admit(client="a")
    with engine.admit(2, client="b"):
        assert engine.admitted == 5
    own.pop().leave()
    own.append(engine.admit(client="a"))
    others = [engine.admit(3, client=name) for name in "bcd"]
    with pytest.raises(EngineBusyError):  # four slots in total
        engine.admit(client="e")
    for place in own + others:
        place.leave()


@started()
async def test_answers_stream_and_end(engine):
    with engine.admit():
        tokens, text, last = await whole(engine.submit(Request([1, 2], GREEDY)))
    assert tokens == expected([1, 2], 20, None) and last.finish == "length" and last.completion_tokens == 20
    assert text == engine.tokenizer.decode(tokens, skip_special_tokens=True)


@started(blocks=40, max_waiting=2_000)
async def test_a_thousand_at_once(engine):
    """A tenth is cancelled; each is answered exactly once."""
    rng = random.Random(0)

    async def client(n):
        prompt = [rng.randrange(50) for _ in range(rng.randrange(1, 60))]
        with engine.admit():
            answers = engine.submit(Request(prompt, GREEDY))
            if n % 10 == 0:
                await asyncio.sleep(rng.random() * 0.05)
                answers.cancel()
            tokens, _, last = await whole(answers)
        right = expected(prompt, 20, None)
        assert tokens == right[: len(tokens)]
        assert last.finish == "length" and tokens == right or (last.finish == "cancelled" and n % 10 == 0)
        return last.finish

    finishes = await asyncio.gather(*(client(n) for n in range(1_000)))
    assert len(finishes) == 1_000 and finishes.count("length") >= 900
    assert sum(engine.core.metrics.finished.values()) == 1_000


@started()
async def test_an_unread_stream_holds_one_output(engine):
    with engine.admit(2):
        slow = engine.submit(Request([1], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True)))
        tokens, _, _ = await whole(engine.submit(Request([2], GREEDY)))
        while slow.request.id in engine._answers:
            await asyncio.sleep(0.01)
        outputs = [output async for output in slow]
    assert len(outputs) == 1 and outputs[0].token_ids == expected([1], 300, None)
    assert tokens == expected([2], 20, None)


@started(max_waiting=3, batch_size_range=(1, 1))
async def test_more_requests_than_slots(engine):
    places = [engine.admit() for _ in range(4)]
    with pytest.raises(EngineBusyError) as busy:
        engine.admit()
    assert busy.value.retry_after >= 1 and "4 requests" in str(busy.value)
    places.pop().leave()
    with pytest.raises(EngineBusyError):
        engine.admit(2)
    with engine.admit():
        pass
    for place in places:
        place.leave()
        place.leave()  # only once


@started()
async def test_impossible_requests_are_immediate_errors(engine):
    for request in (Request([]), Request([1] * 100_000), Request([1_000])):
        with pytest.raises(RequestError):
            engine.submit(request)


@started()
async def test_clients_may_use_the_same_id(engine):
    with engine.admit(2):
        one, two = (engine.submit(Request([n], GREEDY, id="same")) for n in (1, 2))
        (a, _, _), (b, _, _) = await asyncio.gather(whole(one), whole(two))
    assert a == expected([1], 20, None) and b == expected([2], 20, None)


@started()
async def test_drain_waits_and_then_cancels(engine):
    with engine.admit():
        answers = engine.submit(Request([1], GREEDY))
        drain = asyncio.create_task(engine.drain(10))
        await asyncio.sleep(0)
        with pytest.raises(EngineBusyError):
            engine.admit()
        await whole(answers)
    assert await drain


@started(context=1_000_000, blocks=5_000)
async def test_a_drain_that_takes_too_long_cancels(engine):
    with engine.admit():
        answers = engine.submit(Request([1], SamplingParams(temperature=0, max_tokens=100_000, ignore_eos=True)))
        await answers.__anext__()
        assert not await engine.drain(0.05)
        assert (await whole(answers))[2].finish == "cancelled"


@started()
async def test_a_dead_thread_fails_every_request(engine):
    def fail():
        raise RuntimeError("a bug")

    with engine.admit():
        engine.core.runner.before = fail
        _, _, last = await whole(engine.submit(Request([1], GREEDY)))
        assert last.finish == "error" and "stopped" in last.error and "bug" not in last.error
    assert not engine.alive
    with pytest.raises(EngineDeadError):
        engine.admit()
    with pytest.raises(EngineDeadError):
        engine.submit(Request([1], GREEDY))


@pytest.mark.parametrize("running", [False, True])
def test_a_model_whose_file_changed_stops_answering(running):
    """Detected by a step, or by a new request while none runs; all requests get the reason."""

    def changed():
        raise CheckpointChangedError("was written to", file="model.safetensors")

    @started()
    async def test(engine):
        if running:
            with engine.admit():
                engine.core.runner.before = changed
                _, _, last = await whole(engine.submit(Request([1], GREEDY)))
                assert last.finish == "error"
        else:
            engine.core.runner.check_weights = changed
        assert not engine.alive
        for call in (engine.admit, lambda: engine.submit(Request([1], GREEDY)), engine.check_alive):
            with pytest.raises(EngineDeadError) as caught:
                call()
            assert isinstance(caught.value.__cause__, CheckpointChangedError)

    test()


@started()
async def test_metrics_have_the_names_of_vllm(engine):
    with engine.admit():
        await whole(engine.submit(Request([1] * 40, GREEDY)))
    value = engine.registry.get_sample_value
    labels = {"model_name": "mock"}
    assert value("vllm:prompt_tokens_total", labels) == 40 and value("vllm:generation_tokens_total", labels) == 20
    assert value("vllm:request_success_total", {**labels, "finished_reason": "length"}) == 1
    assert value("vllm:time_to_first_token_seconds_count", labels) == 1
    assert value("vllm:inter_token_latency_seconds_count", labels) == 19
    assert value("vllm:iteration_tokens_total_sum", labels) == 60 and value("vllm:request_params_max_tokens_sum", labels) == 20
    for name in ("inference_time_seconds", "prefill_time_seconds", "decode_time_seconds", "num_preemptions", "params_n"):
        assert value(f"vllm:request_{name}_count", labels) == 1
    assert value("vllm:admission_rejections_total", labels) == 0 and value("vllm:prefix_cache_queries_total", labels) == 40
    assert value("vllm:num_requests_running", labels) == 0 and value("vllm:kv_cache_usage_perc", labels) == 0


def test_merging_outputs():
    first = Output("a", [1], "x", [TokenLogprob(1, -1.0)])
    then = Output("a", [2, 3], "yz", [TokenLogprob(2, -2.0), TokenLogprob(3, -3.0)], "stop", completion_tokens=3)
    both = merged(first, then)
    assert both.token_ids == [1, 2, 3] and both.text == "xyz" and both.finish == "stop" and both.completion_tokens == 3
    assert [p.token for p in both.logprobs] == [1, 2, 3]
