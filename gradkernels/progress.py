"""Progress of several tasks: bars on a terminal, plain lines when piped or without rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any, TextIO


class Progress:
    """A context manager; `advance` moves one task and says a word about it.

    >>> with Progress(["a", "b"], total=2, out=sys.stdout) as progress:
    ...     progress.advance("a", 2, "done")
    a  2/2  done
    """

    def __init__(self, names: Iterable[str], total: int, out: TextIO = sys.stderr) -> None:
        self.names, self.out, self._total = tuple(names), out, total
        self._done = dict.fromkeys(self.names, 0)
        self._said = dict.fromkeys(self.names, 0)
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        if out.isatty():
            with contextlib.suppress(ImportError):
                self._make_bars()

    def _make_bars(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(compact=True),
            console=Console(file=self.out),
        )
        self._tasks = {name: self._bars.add_task(name, total=self.total, note="") for name in self.names}

    @property
    def total(self) -> int:
        """Where every task ends; may be set anew on the way."""
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value
        for task in self._tasks.values():
            self._bars.update(task, total=value)

    def __enter__(self):
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def advance(self, name: str, count: int, note: str = "") -> None:
        self._done[name] += count
        done = self._done[name]
        if self._bars:
            self._bars.update(self._tasks[name], advance=count, note=note)
        elif done == self.total or done - self._said[name] >= self.total / 10:
            self._said[name] = done
            width, digits = max(map(len, self.names)), len(str(self.total))
            print(f"{name:{width}}  {done:{digits}}/{self.total}  {note}", file=self.out, flush=True)
