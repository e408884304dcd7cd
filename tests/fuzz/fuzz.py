"""Coverage-guided fuzzing by atheris: bytes are mutated, and what reaches new code is kept and mutated further.

    python tests/fuzz/fuzz.py TARGET --seconds 600      one target of targets.py
    python tests/fuzz/fuzz.py all --seconds 600         all of them, one after the other
    python tests/fuzz/fuzz.py TARGET --keep             adds what reaches code that the corpus does not, small inputs only

Inputs begin from `corpus/TARGET`, which `test_corpus.py` replays. What is found goes to build/fuzz/TARGET; an input that
raises what it should not, hangs or takes too much memory is written there as crash-..., timeout-... or oom-..., and belongs
into the corpus once it is mended. Exit status 1 then.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "fuzz"
SECONDS, MEMORY_MB, LENGTH = 10, 3072, 6144  # of one input at most
SMALL, MOST = 1024, 12  # bytes of an input that is kept, and how many are


def fuzz(name: str, *options: str) -> None:
    """Fuzzes in this process, which libFuzzer ends."""
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


def keep(name: str) -> int:
    """Adds what was found and reaches new code to the corpus: the smallest inputs."""
    corpus = HERE / "corpus" / name
    with tempfile.TemporaryDirectory() as merged:
        command = [sys.executable, __file__, name, "--merge", merged]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        known = {path.read_bytes() for path in corpus.iterdir()}
        found = [path for path in Path(merged).iterdir() if path.read_bytes() not in known and path.stat().st_size <= SMALL]
        for path in sorted(found, key=lambda path: path.stat().st_size)[-MOST:]:
            (corpus / path.name[:12]).write_bytes(path.read_bytes())
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Fuzzes by coverage.")
    parser.add_argument("target")
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--merge", help=argparse.SUPPRESS)
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
        return keep(arguments.target)
    found, corpus = BUILD / arguments.target, HERE / "corpus" / arguments.target
    found.mkdir(parents=True, exist_ok=True)
    if arguments.merge:
        fuzz(arguments.target, "-merge=1", arguments.merge, str(corpus), str(found))
    fuzz(arguments.target, f"-max_total_time={arguments.seconds}", "-print_final_stats=1", str(found), str(corpus))
    return 0


if __name__ == "__main__":
    sys.exit(main())
