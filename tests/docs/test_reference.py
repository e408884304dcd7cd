"""The generated reference pages are up to date."""

from __future__ import annotations

import pytest


@pytest.mark.wide
@pytest.mark.every_run
def test_generated_pages_are_up_to_date():
    from docs.generate.__main__ import ROOT, outdated

    found = [str(path.relative_to(ROOT)) for path in outdated()]
    assert not found, f"{', '.join(found)}: run python -m docs.generate"


def test_every_setting_has_a_description():
    from docs.generate.settings import page

    for line in page().splitlines():
        if line.startswith("| `"):
            assert line.rstrip("| ").count("|") >= 4, line


def test_docstrings_become_sections():
    from docs.generate.markdown import parse

    found = parse(
        """A summary.

        More of it.

        Args:
            one, two: of a pair,
                both numbers.
            three: another: with a colon.

        Returns: what is left.

        Raises:
            ValueError: never.
        """
    )
    assert found.text == "A summary.\n\nMore of it."
    assert found.entries == [("one, two", "of a pair, both numbers."), ("three", "another: with a colon.")]
    assert found.of("two") == "of a pair, both numbers." and found.of("four") == ""
    assert found.returns == "what is left." and found.raises == [("ValueError", "never.")]


def test_cells_have_no_markup():
    from docs.generate.markdown import cell, plain

    assert cell(plain("a|b\n *c* `d*e`")) == r"a\|b \*c\* `d*e`"
