"""The sheet that a benchmark fills in: each row is kept as soon as it is measured, so a run that is cut loses none.

A case that fails says so in its row, and the next one is tried.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias, TypeVar

from rich.table import Table
from rich.text import Text

from mambify.bench.decode_steps import forget
from mambify.errors import MambifyError, UsageError

Row: TypeAlias = dict[str, Any]
Progress = Callable[[int, int], None]
C = TypeVar("C")

_LONGEST_ERROR, _SHOWN_ERROR = 600, 160  # characters of the row's, and of the table's


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


class Sheet:
    """What one benchmark has found so far.

    Attributes:
        facts: what holds for all rows, as plain JSON values; put there before the first of them.
        rows: as they were found.
        done, total: cases.
        failed: how many of them say ``error`` and are our own code's.
        seconds: that the last row took.
        trace: where our own code failed in the last row, as Python tells it; empty where it did not, or where an error
            of mambify's says all there is to say.
    """

    def __init__(
        self,
        device: str,
        *,
        progress: Progress = no_progress,
        found: Callable[[Sheet], None] = lambda sheet: None,
    ) -> None:
        """``progress`` is told how many cases are done, of how many; ``found`` is called after every row."""
        self.facts: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.done = self.total = self.failed = 0
        self.seconds, self.trace = 0.0, ""
        self._device, self._progress, self._found = device, progress, found

    def fill(
        self,
        cases: Sequence[C],
        measure: Callable[[C], Row | Iterable[Row]],
        *,
        about: Callable[[C], Row] = asdict,  # type: ignore[assignment]
        theirs: Callable[[C], bool] = lambda case: False,
        go_on: bool = True,
    ) -> None:
        """Measures every case, and gives back the memory that each leaves behind.

        Args:
            measure: gives the row of a case, or its rows one after another.
            about: what is known of a case before; its rows begin with it, one that failed too.
            theirs: whether a case is other people's code, whose failure is a finding like any other.
            go_on: whether a case that failed gets a row; where other processes would wait for this one, its error is
                raised instead.

        Raises:
            UsageError: the first case was asked for wrongly; no row has been found then.
        """

        def raises(error: Exception) -> bool:
            return not go_on or (isinstance(error, UsageError) and not self.rows)

        self.total = len(cases)
        self._progress(0, self.total)
        for case in cases:
            since = time.perf_counter()
            for row, trace in _attempt(measure, case, raises):
                self.seconds = time.perf_counter() - since
                self.rows.append(about(case) | row)
                ours = "error" in row and not theirs(case)
                self.failed += ours
                self.trace = trace if ours else ""
                self._found(self)
                since = time.perf_counter()
            forget(self._device)
            self.done += 1
            self._progress(self.done, self.total)


def _attempt(
    measure: Callable[[C], Row | Iterable[Row]], case: C, raises: Callable[[Exception], bool]
) -> Iterator[tuple[Row, str]]:
    """The rows of a case, with where it failed in the last of them.

    What is done with a row is none of the case's: an error there is not caught here.
    """
    try:
        found = measure(case)
        for row in [found] if isinstance(found, dict) else found:
            yield row, ""
        return
    except Exception as error:  # whatever it is: one case of many
        if raises(error):
            raise
        reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:_LONGEST_ERROR]
        trace = "" if isinstance(error, MambifyError) else "".join(traceback.format_exception(error)).rstrip()
    yield {"error": reason}, trace  # the error and what its frames hold are gone


def failure(row: Row) -> Text:
    """The cell of a table that says how a row failed; whatever the message holds, it is no markup."""
    return Text(f"failed: {row['error'][:_SHOWN_ERROR]}")


def last_row(table: Table) -> str:
    """The last row of a table on one line: a number after its heading, words by themselves."""
    cells = [(" ".join(str(column.header).split()), str([*column.cells][-1])) for column in table.columns]
    return ", ".join(f"{heading} {cell}" if cell[:1].isdigit() else cell for heading, cell in cells if cell)
