"""Coverage-guided fuzzing with atheris: inputs are mutated, and those that reach new code are kept and mutated further.

    python tests/fuzz/fuzz.py TARGET --seconds 600      one target of targets.py
    python tests/fuzz/fuzz.py all --seconds 600         all targets, one after the other
    python tests/fuzz/fuzz.py TARGET --keep             adds some of the new inputs to the corpus, small ones only

The initial inputs are in `corpus/TARGET`, which `test_corpus.py` replays. New inputs go to build/fuzz/TARGET; an input that
raises an unexpected error, hangs or takes too much memory is written there as crash-..., timeout-... or oom-..., and should be
added to the corpus once the bug is fixed. The exit status is then 1.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
SECONDS, MEMORY_MB, LENGTH = 10, 3072, 6144  # limits per input
SMALL, MAX = 1024, 12  # maximum bytes of an input added to the corpus, and maximum number of inputs


def fuzz(name: str, *options: str) -> None:
    """Fuzzes in this process, which libFuzzer terminates."""
    import atheris

    sys.path[:0] = [str(HERE), str(HERE.parent)]
    with atheris.instrument_imports(include=["deepseek_optimizer"]):
        from targets import TARGETS

    logging.disable()
    target = TARGETS[name]
    folder = BUILD / name
    words = folder.with_suffix(".dict")
    words.write_text("".join('"' + "".join(f"\\x{byte:02x}" for byte in word.encode()) + '"\n' for word in target.words))
    limits = (f"-timeout={SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={LENGTH}")
    atheris.Setup([sys.argv[0], f"-dict={words}", f"-artifact_prefix={folder}/", *limits, *options], target)
    atheris.Fuzz()


def keep(name: str) -> None:
    """Adds some of the new inputs to the corpus, after libFuzzer has minimized them."""
    corpus = HERE / "corpus" / name
    known = {path.read_bytes() for path in corpus.iterdir()}
    small = [path for path in (BUILD / name).iterdir() if path.stat().st_size <= SMALL and "-" not in path.name]
    result = [path for path in small if path.read_bytes() not in known]
    result.sort(key=lambda path: (path.stat().st_size, path.name))
    for path in result[:: max(1, len(result) // MAX)][:MAX]:
        (corpus / path.name[:12]).write_bytes(path.read_bytes())


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes by coverage.")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    targets = sorted(path.name for path in (HERE / "corpus").iterdir())
    if arguments.target == "all":
        command = [sys.executable, __file__, "--seconds", str(arguments.seconds)]
        failed = [name for name in targets if subprocess.run([*command, name]).returncode]
        print(f"failed: {', '.join(failed) or 'none'} of {len(targets)}")
        return bool(failed)
    if arguments.target not in targets:
        parser.error(f"unknown target; there are {', '.join(targets)}")
    if arguments.keep:
        keep(arguments.target)
        return 0
    result, corpus = BUILD / arguments.target, HERE / "corpus" / arguments.target
    result.mkdir(parents=True, exist_ok=True)
    fuzz(arguments.target, f"-max_total_time={arguments.seconds}", "-print_final_stats=1", str(result), str(corpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
