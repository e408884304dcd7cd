"""Locations of records in files, and collection of their errors."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import DataError

SHOWN = 5


class Place(NamedTuple):
    """A location: a file, and the line in it (None: the whole file)."""

    file: str
    line: int | None

    def error(self, message: str, field: str | None = None) -> DataError:
        """An error at this location."""
        return DataError(message, file=self.file, line=self.line, field=field)

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}, line {self.line:,}"


class BadLines:
    """Counts invalid records, and collects the messages of the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def raise_if_any(self, remedy: str) -> None:
        """Raises an error if there are invalid records.

        Raises:
            DataError: with the number of invalid records, the first few messages, and the remedy.
        """
        if self.count == 1:
            raise DataError(f"{self.first[0]}. {remedy}")
        if self.count:
            shown = "" if self.count <= SHOWN else f"; the first {SHOWN}"
            raise DataError(f"{self.count:,} records are invalid{shown}:\n" + ";\n".join(self.first) + f".\n{remedy}")
