"""Strategies to answer from a document longer than a prompt: one per file, each a generator (see `work`)."""

from __future__ import annotations

from .choose import STRATEGIES, answer_by, check_name, choose

__all__ = ["STRATEGIES", "answer_by", "check_name", "choose"]
