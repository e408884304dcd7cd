"""From fonts and text files to a small OCR model of one's own, which reads a line of text in a picture.

    python examples/tiny_ocr/train.py --output tiny-ocr
    dso run tiny-ocr/int4 "Read" --image line.png

A random model of Qwen2.5-VL's shape is trained on lines that are drawn as it goes; it is packed as int4, and both read lines of
held-out texts. See README.md beside this file.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "tiny_v3"))  # after this folder

from corpus import gather
from lines import BUILT_IN, Drawing, Texts, errors, find_fonts
from reader import SIZES, Batches, Size, make_image_processor, make_model, make_tokenizer

_WARM_UP = 100  # steps
_CONSTANT = 0.4  # share of training after which the learning rate falls
_EVERY = 50  # steps between reports
_SAVE = 60.0  # seconds between checkpoints


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = _parser().parse_args(arguments)
    size, started = SIZES[options.size], time.monotonic()
    say = _teller(started)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    fonts = options.font or find_fonts()
    texts = gather(options.characters)
    say(f"{len(texts.train)} texts, {len(texts.held_out)} held out, {len(fonts)} fonts")

    trainer = Training(size, texts.train, fonts, output, say)
    say(f"{trainer.model.num_parameters() / 1e6:.2f} M weights")
    trainer.run(60 * options.minutes, options.steps)
    trainer.save()
    results: dict[str, Any] = {"steps": trainer.step, "lines": trainer.step * size.batch, "loss": trainer.loss}

    held_out, drawing = Texts(texts.held_out, 0), Drawing(fonts, size.patch, size.cells, 0)
    written = [held_out.line(min(8, size.longest), size.longest) for _ in range(options.test)]
    pictures = [drawing.picture(text) for text in written]
    results["error_rate"] = {"Transformers, fp32": error_rate(trainer.read(pictures), written)}
    for precision in ("bf16", "int4"):
        results["error_rate"][f"OcrModel, {precision}"] = error_rate(read(output / "model", precision, pictures, size), written)
    for name, rate in results["error_rate"].items():
        say(f"{name}: {rate:.2%} of the characters of {len(written)} held-out lines are wrong")
    pack(output)
    results["minutes"] = round((time.monotonic() - started) / 60, 2)
    (output / "results.json").write_text(json.dumps(results, indent=1))
    say(f"done: dso run {output / 'int4'} Read --image line.png")
    return results


class Training:
    """
    Args:
        texts: documents to learn from.
        fonts: see `Drawing`.
        output: folder that the model goes to. If training was interrupted, it goes on from the checkpoint there.
        say: reports progress.
    """

    def __init__(
        self, size: Size, texts: Sequence[str], fonts: Sequence[str], output: Path, say: Callable[[str], None]
    ) -> None:
        import torch

        torch.manual_seed(0)
        self._size, self._output, self._say = size, output, say
        self.tokenizer, self.image_processor = make_tokenizer(), make_image_processor(size)
        self.batches = Batches(self.tokenizer, self.image_processor)
        self.model = make_model(size, self.tokenizer)
        decays = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        groups = [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=size.rate, betas=(0.9, 0.98), fused=True)
        self.step, self.seconds, self.loss = 0, 0.0, float("nan")  # seconds of training, of earlier runs too
        if (checkpoint := output / "checkpoint.pt").exists():
            state = torch.load(checkpoint, weights_only=True)
            if state["size"] != asdict(size):
                raise SystemExit(f"{checkpoint} was made with another --size: choose another --output, or delete it")
            self.model.load_state_dict(state["model"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]
            say(f"going on from step {self.step}")
        seed = 1 + self.step  # never the lines of an earlier run
        self._texts, self._drawing = Texts(texts, seed), Drawing(fonts, size.patch, size.cells, seed)

    def run(self, seconds: float, steps: int | None) -> None:
        """Trains for so much processor time, or for `steps`, whatever the time."""
        import torch

        last, saved = time.process_time(), time.monotonic()
        losses: list[float] = []
        self.model.train()
        while self._progress(seconds, steps) < 1.0:
            texts = [self._texts.line(2, self._size.longest) for _ in range(self._size.batch)]
            pictures = [self._drawing.picture(text) for text in texts]
            for group in self._optimizer.param_groups:
                group["lr"] = self._size.rate * self._factor(self._progress(seconds, steps))
            loss = self.model(**self.batches.training(pictures, texts)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.step += 1
            losses.append(loss.item())
            now = time.process_time()
            self.seconds, last = self.seconds + (now - last) / torch.get_num_threads(), now
            if self.step % _EVERY == 0:
                self.loss, losses = sum(losses) / len(losses), []
                self._say(f"step {self.step}: loss {self.loss:.4f} nats per character")
            if time.monotonic() - saved > _SAVE:
                saved = time.monotonic()
                self._checkpoint()
        if losses:
            self.loss = sum(losses) / len(losses)
        self.model.eval()

    def read(self, pictures: Sequence[Any]) -> list[str]:
        """What the model reads, computed by Transformers."""
        import torch

        found = []
        for begin in range(0, len(pictures), self._size.batch):
            arguments = self.batches.reading(pictures[begin : begin + self._size.batch])
            with torch.no_grad():
                ids = self.model.generate(**arguments, max_new_tokens=2 * self._size.longest, do_sample=False)
            found += self.tokenizer.batch_decode(ids[:, arguments["input_ids"].shape[1] :], skip_special_tokens=True)
        return found

    def save(self) -> None:
        """Saves a checkpoint that Transformers and `load_model` load."""
        for part in (self.model, self.tokenizer, self.image_processor):
            part.save_pretrained(self._output / "model")

    def _progress(self, seconds: float, steps: int | None) -> float:
        return min(1.0, self.seconds / max(1e-3, seconds) if steps is None else self.step / steps)

    def _factor(self, progress: float) -> float:
        return min(1.0, (self.step + 1) / _WARM_UP, max(0.01, (1.0 - progress) / (1.0 - _CONSTANT)))

    def _checkpoint(self) -> None:
        import torch

        state = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        new = self._output / "checkpoint.new"
        torch.save(state | {"size": asdict(self._size), "step": self.step, "seconds": self.seconds}, new)
        new.replace(self._output / "checkpoint.pt")


def read(folder: Path, precision: str, pictures: Sequence[Any], size: Size) -> list[str]:
    """What the model reads, as `dso longdoc --ocr` uses it."""
    from deepseek_optimizer.longdoc.ocr_model import OcrModel

    with OcrModel(str(folder), max_tokens=2 * size.longest, precision=precision) as model:
        return ["\n".join(line.text for line in model.read(picture)) for picture in pictures]


def pack(output: Path) -> None:
    """Saves the model as int4."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from deepseek_optimizer import load_model

    load_model(output / "model", precision="int4").save_pretrained(output / "int4")
    for kind in (AutoTokenizer, AutoImageProcessor):
        kind.from_pretrained(output / "model").save_pretrained(output / "int4")


def error_rate(read: Sequence[str], written: Sequence[str]) -> float:
    """Wrong characters for each one that was written."""
    return sum(map(errors, read, written)) / sum(map(len, written))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="tiny-ocr", help="folder that the model goes to (model/, int4/, results.json)")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training, in processor time of a thread")
    parser.add_argument("--steps", type=int, help="of training, whatever the time")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument(
        "--font", action="append", help=f"file of a font of fixed width; may be repeated; {BUILT_IN!r}: Pillow's"
    )
    parser.add_argument("--characters", type=int, default=4_000_000, help="of text to take lines from, at most")
    parser.add_argument("--test", type=int, default=500, help="held-out lines to read")
    return parser


def _teller(started: float) -> Callable[[str], None]:
    return lambda text: print(f"[{time.monotonic() - started:6.1f} s] {text}", flush=True)


if __name__ == "__main__":
    main()
