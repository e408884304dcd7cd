"""The process of one of the ranks 1 and higher: loads its part of a model, and runs what the leader says.

Started by `ranks.start_ranks` with the numbers of two file descriptors: the group's memory, or -1 for a pipeline, which has
none, and the pipe to the leader.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from multiprocessing.connection import Connection


def main() -> int:
    """Returns the process's status."""
    # Ctrl-C in a terminal and SIGTERM of a service manager reach all processes at once. The leader ends this one, when it has
    # finished what it is doing.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    memory, pipe = map(int, sys.argv[1:])
    answers = Connection(pipe)
    job = answers.recv()
    if job["cpus"] is not None:
        os.sched_setaffinity(0, job["cpus"])  # before there are other threads, which then stay on these CPUs too
    from ...backends.cpu.group import SharedGroup
    from ...backends.parallel import serve
    from ...backends.parallel.messages import FAILED, READY, answer
    from ...config import DeepSeekConfig
    from .loader import load
    from .member import Member, own_part

    if memory < 0:  # of a pipeline
        member = Member(job["rank"], job["threads"], link=answers)
    else:
        member = Member(job["rank"], job["threads"], SharedGroup(memory, job["rank"], job["ranks"]))
        os.close(memory)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the leader issues them
            settings = DeepSeekConfig.from_dict(job["settings"])
            model = load(job["path"], settings, {}, member=member)
    except BaseException as error:  # whatever it is, the leader raises it
        answer(answers, FAILED, f"{type(error).__name__}: {error}")
        return 1
    if member.group is None:
        return 0  # the leader has ended
    answer(answers, READY, "")
    serve(model.dso.backend, own_part(model.dso), answers)
    return 0
