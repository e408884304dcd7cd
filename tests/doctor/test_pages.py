"""Huge pages: the system's setting."""

from __future__ import annotations

import pytest

from deepseek_optimizer.doctor.checks import pages

SETTING = "/sys/kernel/mm/transparent_hugepage/enabled"


@pytest.mark.parametrize(
    ("text", "severity", "what"),
    [
        ("always [madvise] never", "ok", "madvise"),
        ("[always] madvise never", "ok", "always"),
        ("always madvise [never]", "warning", "off"),
        ("", "note", "does not report"),
    ],
)
def test_setting(case, machine, one, text, severity, what):
    one(pages.check(case(machine=machine({SETTING: text}))), severity, what)


def test_no_such_file(case, one):
    one(pages.check(case()), "note", "does not report")
