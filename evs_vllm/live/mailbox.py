# SPDX-License-Identifier: Apache-2.0
"""From the thread that reads the source to the one that asks the server: one place, in which the latest turn lies."""

import threading
from collections.abc import Callable, Iterable

from evs_vllm.live.chunks import Turn


class Mailbox:
    """Holds at most one turn; a later one replaces it, and its frames count as dropped.

    Args:
        waits: Instead of replacing a turn, `post` waits until it is taken.
    """

    def __init__(self, waits: bool = False) -> None:
        self._waits = waits
        self._changed = threading.Condition()
        self._turn: Turn | None = None
        self._dropped = 0
        self._closed = False
        self._error: BaseException | None = None

    def post(self, turn: Turn) -> None:
        """Puts a turn there; into a mailbox that is closed, nothing."""
        with self._changed:
            if self._waits:
                self._changed.wait_for(lambda: self._turn is None or self._closed)
            if self._closed:
                return
            if self._turn is not None:
                self._dropped += self._turn.frames
            self._dropped += turn.skipped
            self._turn = turn
            self._changed.notify_all()

    def close(self, error: BaseException | None = None) -> None:
        """Says that nothing will come any more; `error` is raised where the next turn would have been taken."""
        with self._changed:
            self._closed, self._error = True, self._error or error
            self._changed.notify_all()

    def take(self) -> Turn | None:
        """Waits for a turn; None when nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn is not None or self._closed)
            turn, self._turn = self._turn, None
            self._changed.notify_all()
            if turn is None and self._error is not None:
                raise self._error
            return turn

    def dropped(self) -> int:
        """Frames that were dropped since the last call."""
        with self._changed:
            count, self._dropped = self._dropped, 0
            return count


def read_into(mailbox: Mailbox, turns: Callable[[], Iterable[Turn]]) -> threading.Thread:
    """A running thread that posts all `turns` and closes the mailbox, with the error if they end in one."""

    def read() -> None:
        try:
            for turn in turns():
                mailbox.post(turn)
        except BaseException as error:
            mailbox.close(error)
        else:
            mailbox.close()

    # A camera's driver may hang in a read that nothing interrupts; the process can end all the same.
    thread = threading.Thread(target=read, name="evs-live-source", daemon=True)
    thread.start()
    return thread
