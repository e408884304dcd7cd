"""From text files to a chat with a DeepSeek-V3-shaped model of one's own, in minutes on a small machine.

    python examples/tiny_v3/train.py --output tiny --minutes 10
    dso chat tiny/int4

A tokenizer is trained, then the model with its multi-token prediction layer, experts balanced without a loss of their own; it
is packed as int4, and what its drafts are worth is measured by the engine that will serve it. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from corpus import Corpus, gather, questions
from model import SIZES, Size, make_model, make_tokenizer

_MTP_WEIGHT, _LATE_MTP_WEIGHT, _LATE = 0.3, 0.1, 2 / 3  # as V3 had it: the smaller one for the last third
_BALANCE_RATE = 0.02  # at first: a run so short has no time for V3's 0.001
_WARM_UP = 40  # steps
_CONSTANT = 0.4  # share of the time after which the learning rate falls
_LEFT_OVER = 0.06  # share of the time for what follows training
_PROMPTS, _PROMPT, _ANSWER = 12, 64, 48  # held-out texts that drafts are measured on; their tokens; tokens that are made


@dataclass(frozen=True)
class Kind:
    """What is trained.

    Attributes:
        name: of the folder that it goes to, unless another is given.
        make_model: (size, tokenizer) -> a random model with a layer for multi-token prediction, which drafts.
        separates: documents of a row do not attend to each other; otherwise each row is one text.
    """

    name: str
    make_model: Callable[[Size, Any], Any]
    separates: bool = True


V3 = Kind("tiny-v3", make_model)


def main(arguments: list[str] | None = None, kind: Kind = V3) -> dict[str, Any]:
    options = _parser(kind).parse_args(arguments)
    size, started = SIZES[options.size], time.monotonic()
    end = started + 60 * options.minutes
    say = _teller(started)
    output = Path(options.output)

    texts = gather(options.characters)
    say(f"{len(texts.train)} texts, {len(texts.held_out)} held out, {sum(map(len, texts.train)) / 1e6:.1f} M characters")
    tokenizer = make_tokenizer(texts.train[::4], size.vocabulary, size.length)
    train, held_out = rows_of(texts, tokenizer, size, kind)
    say(f"{len(tokenizer)} tokens in the vocabulary, {len(train) * size.length / 1e6:.2f} M tokens to train on")

    last = end - _LEFT_OVER * 60 * options.minutes
    trainer = make_trainer(kind, size, tokenizer, train, held_out, output, last, options.steps, say)
    say(f"{trainer.model.num_parameters() / 1e6:.1f} M weights")
    trainer.train()
    results = {"eval_loss": trainer.evaluate()["eval_loss"], **loads(trainer, held_out)}
    results["tokens"] = trainer.state.global_step * size.batch * size.length
    say(f"held-out loss {results['eval_loss']:.3f} nats a token after {results['tokens'] / 1e6:.2f} M tokens; "
        f"the busiest expert has {results['expert_load']:.2f} times the mean load")  # fmt: skip
    trainer.save_model(str(output / "model"))
    tokenizer.save_pretrained(output / "model")

    fast = pack(output, tokenizer)
    results["mtp_acceptance"] = measure_drafts(fast, held_out)
    say(f"drafts of the packed model hold at {results['mtp_acceptance']:.0%} of places")
    results["minutes"] = round((time.monotonic() - started) / 60, 2)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    say(f"done: dso chat {output / 'int4'}")
    return results


def rows_of(texts: Corpus, tokenizer: Any, size: Size, kind: Kind) -> tuple[list[Any], list[Any]]:
    """Rows to train on, and held-out ones: documents one after the other, cut at the length of a row."""
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], tokenize=False
        )
        for question, answer in questions(texts.train, 3000)
    ]
    plain = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in texts.train]
    step = max(1, len(plain) // max(1, len(chats)))
    mixed = [*chain.from_iterable(zip(plain[::step], chats, strict=False)), *(t for i, t in enumerate(plain) if i % step)]
    held = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in texts.held_out]
    train, held_out = _rows(mixed, tokenizer, size.length), _rows(held, tokenizer, size.length)[:200]
    if not kind.separates:
        for row in (*train, *held_out):
            del row["position_ids"]
    return train, held_out


def _rows(documents: list[str], tokenizer: Any, length: int) -> list[Any]:
    import torch

    ids: list[int] = []
    positions: list[int] = []
    for document in tokenizer(documents, add_special_tokens=False)["input_ids"]:
        ids += document
        positions += range(len(document))
    rows = []
    for begin in range(0, len(ids) - length + 1, length):
        row = torch.tensor(ids[begin : begin + length])
        place = torch.tensor(positions[begin : begin + length])
        first = int((place == 0).nonzero()[0]) if bool((place == 0).any()) else length
        place[:first] -= int(place[0])  # a document that began in the row before
        rows.append({"input_ids": row, "labels": row, "position_ids": place})
    return rows


def make_trainer(
    kind: Kind, size: Size, tokenizer: Any, train: list[Any], held_out: list[Any], output: Path, end: float,
    steps: int | None, say: Callable[[str], None],
) -> Any:  # fmt: skip
    """A trainer that stops when `end` comes, or after `steps`, and whose learning rate knows when that is."""
    from torch.optim.lr_scheduler import LambdaLR
    from transformers import TrainerCallback, set_seed

    from deepseek_optimizer import DeepSeekTrainer, DeepSeekTrainingArguments

    begin = time.monotonic()

    def progress() -> float:
        if steps is not None:
            return min(1.0, trainer.state.global_step / steps)
        return min(1.0, (time.monotonic() - begin) / max(1e-3, end - begin))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / _WARM_UP, max(0.01, (1.0 - progress()) / (1.0 - _CONSTANT)))

    class Timed(DeepSeekTrainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

    class InTime(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            trainer.balancing.rate = _BALANCE_RATE * factor(state.global_step)  # V3's was 0 in the end
            control.should_training_stop = control.should_training_stop or progress() >= 1.0

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                named = {"loss": logs["loss"] - trainer.mtp.weight * logs["mtp_loss"]}
                named |= {name: logs[name] for name in ("mtp_loss", "expert_load", "learning_rate") if name in logs}
                say(f"step {state.global_step}: " + ", ".join(f"{name} {value:.4g}" for name, value in named.items()))
                trainer.mtp.weight = _MTP_WEIGHT if progress() < _LATE else _LATE_MTP_WEIGHT

    set_seed(0)
    arguments = DeepSeekTrainingArguments(
        output_dir=str(output), max_steps=1_000_000, per_device_train_batch_size=size.batch, per_device_eval_batch_size=8,
        learning_rate=size.rate, weight_decay=0.1, adam_beta2=0.95, moe_balance_rate=_BALANCE_RATE,
        mtp_loss_weight=_MTP_WEIGHT, logging_steps=25, save_strategy="no", report_to="none",
        disable_tqdm=True, seed=0, use_cpu=True, dataloader_drop_last=True, prediction_loss_only=True,
    )  # fmt: skip
    trainer = Timed(kind.make_model(size, tokenizer), arguments, train_dataset=train, eval_dataset=held_out)
    trainer.add_callback(InTime())
    for printer in ("PrinterCallback", "ProgressCallback"):
        for callback in [c for c in trainer.callback_handler.callbacks if type(c).__name__ == printer]:
            trainer.remove_callback(callback)
    return trainer


def loads(trainer: Any, held_out: list[Any]) -> dict[str, float]:
    """The largest load of an expert over the mean one, in the worst layer: of held-out texts as a whole, and as the mean over
    the batches of the second half of training."""
    import torch

    from deepseek_optimizer.train.balancing import ExpertBalancing

    counter, model = ExpertBalancing(rate=0.0), trainer.model
    counter.attach(model)
    model.train()  # loads are counted then
    with torch.no_grad():
        for row in held_out:
            model(**{name: row[name][None] for name in row if name != "labels"}, use_cache=False)
    counter.step()
    model.eval()
    found = {"expert_load": counter.statistics()["expert_load"]}
    counter.detach()
    batches = [entry["expert_load_batch"] for entry in trainer.state.log_history if "expert_load_batch" in entry]
    late = batches[len(batches) // 2 :]
    return found | ({"expert_load_batch": sum(late) / len(late)} if late else {})


def pack(output: Path, tokenizer: Any) -> Any:
    """The model as int4, which is also saved."""
    from deepseek_optimizer import load_model

    fast = load_model(output / "model", precision="int4")
    fast.save_pretrained(output / "int4")
    tokenizer.save_pretrained(output / "int4")
    return fast


def measure_drafts(fast: Any, held_out: list[Any]) -> float:
    """The share of drafts that hold where the model goes on with held-out texts, each token drafted by its MTP layer."""
    made, held = 0, 0.0
    for row in held_out[:: max(1, len(held_out) // _PROMPTS)]:
        prompt = row["input_ids"][None, :_PROMPT]
        drafts = {"use_mtp": True, "num_assistant_tokens": 1, "num_assistant_tokens_schedule": "constant"}
        fast.generate(prompt, max_new_tokens=_ANSWER, min_new_tokens=_ANSWER, do_sample=False, **drafts)
        report = fast.dso.speculation
        made += report.proposed[0]
        held += report.acceptance[0] * report.proposed[0]
    return held / made if made else 0.0


def _parser(kind: Kind) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default=kind.name, help="folder that the model goes to (model/, int4/, results.json)")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long all of it may take")
    parser.add_argument("--steps", type=int, help="of training, whatever the time")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--characters", type=int, default=14_000_000, help="of text to train on, at most")
    return parser


def _teller(started: float) -> Callable[[str], None]:
    return lambda text: print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
