"""Ends a process in which nothing moves any more, and shows where each of its threads stood."""

from __future__ import annotations

import faulthandler
import sys
import threading
import time

_SECONDS_TO_SPEAK = 1.0


class HangWatch:
    """Writes the stacks of all threads to standard error and ends the process with code 1 when time is up.

    A rank that waits for a dead or stopped peer may wait for ever, and in a call that holds Python's lock:
    faulthandler's watchdog is a thread of C that needs no lock. Exit code 1 makes torchrun restart all.

    Args:
        minutes: between two calls of moved(); 0 never ends anything.
    """

    # moved() may be called for every token: the watchdog is wound up once in this share of its time.
    _FINENESS = 0.01

    def __init__(self, minutes: float) -> None:
        self._seconds = minutes * 60
        self._last, self._is_watched = time.monotonic(), False
        self._ended = threading.Event()

    def __enter__(self) -> HangWatch:
        if self._seconds > 0:
            self._wind_up()
            threading.Thread(target=self._explain, name="hang-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()

    def moved(self) -> None:
        """Something was finished: count from now on; nothing outside `with`."""
        is_watched = self._is_watched and not self._ended.is_set()
        if is_watched and time.monotonic() - self._last >= self._FINENESS * self._seconds:
            self._wind_up()

    def _wind_up(self) -> None:
        self._last, self._is_watched = time.monotonic(), True
        assert sys.__stderr__ is not None
        faulthandler.dump_traceback_later(self._seconds + _SECONDS_TO_SPEAK, exit=True, file=sys.__stderr__)

    def _explain(self) -> None:
        """Say in words what the watchdog is about to show, if Python's lock can be had."""
        while not self._ended.wait(max(self._last + self._seconds - time.monotonic(), 0.01)):
            if time.monotonic() >= self._last + self._seconds:
                print(
                    f"nothing was finished for {self._seconds / 60:g} minutes (train.hang_minutes): this "
                    "process shows where it stands and ends. A rank that shows nothing is stopped or gone",
                    file=sys.__stderr__,
                    flush=True,
                )
                return
