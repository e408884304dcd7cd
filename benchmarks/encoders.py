"""Embeddings of ragged sentences by an optimized encoder, against sentence-transformers in fp32, sides in turns.

The model has BERT-base's shape and random weights; sentence-transformers tokenizes, sorts, pads and pools on both sides. Bar of
issue 16: 1,000 sentences at 3 times the speed of fp32, cosine at least 0.999. Needs the package sentence-transformers.

    python -m benchmarks.encoders [--sentences 1000] [--forms int8 int8-int8 bf16] [--threads N] [--seconds 100]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

from deepseek_optimizer import DeepSeekConfig
from deepseek_optimizer.bench.hardware import usable_cpus

from .alternating import alternate, clock_of, shown, speedup
from .verdict import MISSED, REACHED

FAST, ALIKE = 3.0, 0.999
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "bf16": {"precision": "bf16"},
    "int8": {"precision": "int8"},
    "int8-int8": {"precision": "int8", "activation": "int8"},
    "int4": {"precision": "int4"},
}
VOCABULARY, LONGEST = 30522, 440


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sentences", type=int, default=1000)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=["int8", "int8-int8", "bf16"])
    parser.add_argument("--threads", type=int, default=usable_cpus())
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=100.0, help="no further round begins after this time")
    parser.add_argument("--busy", action="store_true", help="measure processor time, since the machine is busy")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory))
        print(json.dumps(measure(Path(directory), a)))


def measure(path: Path, a: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(a.threads)
    texts = sentences(a.sentences)
    encoders = {"sentence-transformers": encoder(path)}
    encoders |= {form: encoder(path, DeepSeekConfig(**FORMS[form], threads=a.threads)) for form in a.forms}
    results: dict[str, Any] = {}

    def encode(name: str, some: list[str]) -> Any:
        return encoders[name].encode(some, batch_size=a.batch, convert_to_tensor=True, show_progress_bar=False)

    def side(name: str) -> Any:
        def run() -> None:
            results[name] = encode(name, texts)

        return run

    for name in encoders:  # not with all sentences, which take a minute in fp32
        encode(name, texts[: 2 * a.batch])
    times = alternate({name: side(name) for name in encoders}, a.rounds, a.seconds, clock_of(a.busy), warm=True)
    found: dict[str, Any] = {"sentences": len(texts), "tokens": sum(len(text.split()) + 2 for text in texts), "times": times}
    for form in a.forms:
        ratio = speedup(times, form, "sentence-transformers")
        cosine = float(torch.cosine_similarity(results[form], results["sentence-transformers"]).min())
        found[form] = {**ratio, "cosine": cosine, "verdict": REACHED if ratio["median"] >= FAST and cosine >= ALIKE else MISSED}
        print(f"{shown(form, ratio)}, smallest cosine {cosine:.5f}", flush=True)
    return found


def encoder(path: Path, config: DeepSeekConfig | None = None) -> Any:
    """A SentenceTransformer with the mean of the tokens' last hidden states."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    kwargs: dict[str, Any] = {"dtype": torch.float32} if config is None else {"quantization_config": config}
    body = Transformer(str(path), model_kwargs=kwargs)
    return SentenceTransformer(modules=[body, Pooling(body.get_embedding_dimension(), "mean")], device="cpu")


def sentences(count: int) -> list[str]:
    """Random words; the numbers of words are distributed as in short texts, with a few long ones."""
    generator = random.Random(0)
    lengths = [min(LONGEST, 2 + int(generator.lognormvariate(3.1, 0.9))) for _ in range(count)]
    return [" ".join(f"w{generator.randrange(VOCABULARY - 5)}" for _ in range(length)) for length in lengths]


def write_model(path: Path) -> None:
    """Writes a model of BERT-base's shape, and a tokenizer that gives each word of `sentences` one token."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    BertModel(BertConfig()).save_pretrained(path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(VOCABULARY - 5))]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(path)


if __name__ == "__main__":
    main()
