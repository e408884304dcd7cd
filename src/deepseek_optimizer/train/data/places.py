"""Where a record stands, and what was wrong with which."""

from __future__ import annotations

from typing import NamedTuple

from ...errors import DataError

SHOWN = 5


class Place(NamedTuple):
    """A file and the line in it; None: the file as a whole."""

    file: str
    line: int | None

    def error(self, message: str, field: str | None = None) -> DataError:
        """That something is wrong there."""
        return DataError(message, file=self.file, line=self.line, field=field)

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}, line {self.line:,}"


class BadLines:
    """Collects what is wrong with lines: how many there are, and the first few."""

    def __init__(self) -> None:
        self.count = 0
        self.first: list[str] = []

    def add(self, error: DataError) -> None:
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append(str(error))

    def raise_if_any(self, remedy: str) -> None:
        """
        Raises:
            DataError: there are any; it shows the first few.
        """
        if self.count == 1:
            raise DataError(f"{self.first[0]}. {remedy}")
        if self.count:
            shown = "" if self.count <= SHOWN else f"; the first {SHOWN}"
            raise DataError(f"{self.count:,} records cannot be used{shown}:\n" + ";\n".join(self.first) + f".\n{remedy}")
