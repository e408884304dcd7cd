"""Ways to answer from a document that is longer than a prompt: one file each, all of them generators (see `work`)."""

from __future__ import annotations

from .choose import STRATEGIES, answer_by, check_name, choose

__all__ = ["STRATEGIES", "answer_by", "check_name", "choose"]
