"""Threads against processors: affinity, quota, hyper-threads."""

from __future__ import annotations

from deepseek_optimizer.backends.cpu import native
from deepseek_optimizer.doctor import Machine
from deepseek_optimizer.doctor.checks import threads

V2 = {"/proc/self/cgroup": "0::/pod/box\n"}


def test_as_many_threads_as_processors(case, one):
    finding = one(threads.check(case()), "ok", "4 threads on 4")
    assert finding.facts["cgroup_cpus"] is None


def test_more_than_processors(case, one):
    assert "set them to 4" in one(threads.check(case(fields={"threads": 9})), "warning", "9 threads share 4 CPUs").fix


def test_more_than_the_quota(case, machine, one):
    files = {**V2, "/sys/fs/cgroup/pod/box/cpu.max": "150000 100000"}
    finding = one(threads.check(case(machine=machine(files), fields={"threads": 4})), "warning", "the cgroup allows 1.5")
    assert finding.facts["cgroup_cpus"] == 1.5 and "set threads to 2" in finding.fix


def test_the_quota_sets_the_number(case, machine, one):
    files = {**V2, "/sys/fs/cgroup/pod/cpu.max": "200000 100000", "/sys/fs/cgroup/pod/box/cpu.max": "max 100000"}
    one(threads.check(case(machine=machine(files))), "ok", "2 threads on 2")


def test_fewer_than_processors(case, one):
    one(threads.check(case(fields={"threads": 1})), "note", "1 threads leave 3 of 4")


def test_threads_set_by_the_environment(case, one, monkeypatch):
    monkeypatch.setenv("DSO_THREADS", "6")
    one(threads.check(case()), "warning", "6 threads share 4")
    one(threads.check(case(fields={"threads": 4})), "ok", "4 threads")


def test_invalid_thread_variables(case, one, monkeypatch):
    monkeypatch.setenv("DSO_THREADS", "all")
    assert "all" in one(threads.check(case()), "error", "DSO_THREADS").cause


def test_throttled(case, machine, one):
    files = {**V2, "/sys/fs/cgroup/pod/box/cpu.stat": "nr_periods 90\nnr_throttled 17\n"}
    finding = one(threads.check(case(machine=machine(files))), "warning", "throttled this container 17 times")
    assert finding.facts["throttled_periods"] == 17


def test_affinity(case, machine, one):
    one(threads.check(case(machine=machine(usable_cpus=2))), "note", "2 of 4 CPUs")


def test_hyper_threads(case, machine, one):
    both = machine(usable_cores=2)
    one(threads.check(case(machine=both)), "ok", "2 threads on 4")
    assert "threads=2" in one(threads.check(case(machine=both, fields={"threads": 4})), "note", "4 threads on 2 cores").fix


def test_hyper_threads_of_an_affinity_mask(case, machine, one):
    half = machine(usable_cpus=4, online_cpus=8, usable_cores=2)
    one(threads.check(case(machine=half, fields={"threads": 4})), "note", "4 threads on 2 cores")
    assert not [f for f in threads.check(case(machine=half, fields={"threads": 2})) if "idle" in f.what]


def test_the_usual_number_is_that_of_the_backend(case, monkeypatch):
    """On this machine, whatever it is: an affinity mask may leave whole cores or half ones."""
    monkeypatch.delenv("DSO_THREADS", raising=False)
    used = native.number(native.library().dso_default_threads())
    facts = [f.facts for f in threads.check(case(machine=Machine.here())) if "threads" in (f.facts or {})]
    assert facts and facts[0]["threads"] == used


def test_no_hyper_threads_no_note(case):
    assert [f.severity for f in threads.check(case())] == ["ok"]
