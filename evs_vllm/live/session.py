# SPDX-License-Identifier: Apache-2.0
"""A session: reads the source, asks every turn, reports, and ends cleanly."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator

from evs_vllm.errors import ServerError
from evs_vllm.live.chat import Conversation
from evs_vllm.live.chunks import Turn
from evs_vllm.live.client import Client, why_refused
from evs_vllm.live.mailbox import Mailbox, read_into
from evs_vllm.live.report import Report, Row, number
from evs_vllm.serving import Answer

CLOSING_S = 3.0
"""How long the source may take to be closed."""


class Interrupt:
    """Ctrl-C and SIGTERM while the block lasts: they end what is in `waiting` at once, and nothing else in the middle.

    Attributes:
        asked: Whether one came.
    """

    def __init__(self) -> None:
        self.asked = False
        self._waiting = False

    def __enter__(self) -> "Interrupt":
        self._before = {sign: signal.signal(sign, self._note) for sign in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for sign, handler in self._before.items():
            signal.signal(sign, handler)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """A part that may be left by a ``KeyboardInterrupt``."""
        try:
            self._waiting = True
            if self.asked:
                raise KeyboardInterrupt
            yield
        finally:
            self._waiting = False

    def _note(self, sign: int, frame: object) -> None:
        self.asked = True
        if self._waiting:
            raise KeyboardInterrupt


def watch(
    turns: Callable[[], Iterable[Turn]],
    stop: threading.Event,
    client: Client,
    conversation: Conversation,
    report: Report,
    waits: bool,
) -> None:
    """Asks about each turn until the source ends or the user does not want more.

    Args:
        turns: Reads the source, in a thread of its own; ends soon after `stop` is set.
        stop: Set here at the end.
        client: Connected.
        conversation: Without turns.
        report: Gets every turn, and the summary, also after an error.
        waits: Reads no faster than the server answers, instead of dropping frames.

    Raises:
        EVSError: The source is lost, or the server is or refuses.
    """
    mailbox = Mailbox(waits)
    why = "ended by an error"
    with Interrupt() as interrupt:
        thread = read_into(mailbox, turns)
        try:
            why = _ask_all(mailbox, client, conversation, report, interrupt)
        finally:
            stop.set()
            mailbox.close()
            thread.join(CLOSING_S)
            report.end(why, mailbox.dropped(), conversation.forgotten)


def _ask_all(mailbox: Mailbox, client: Client, conversation: Conversation, report: Report, interrupt: Interrupt) -> str:
    """Asks until nothing is left, and returns why."""
    last_tokens, asked = 0, 0
    while True:
        try:
            with interrupt.waiting():
                turn = mailbox.take()
        except KeyboardInterrupt:
            return "stopped"
        if turn is None:
            return "the source has ended"
        forgotten = conversation.add(turn)
        pieces: list[str] = []
        answer: Answer | None = None
        try:
            with interrupt.waiting():
                answer = client.ask(conversation, pieces)
        except KeyboardInterrupt:
            if not pieces:
                return "stopped"
        except ServerError as error:
            if error.status is None or error.status >= 500:
                raise
            raise why_refused(error, conversation, turn.chunks[-1].stop, asked) from None
        asked += 1
        row = Row(
            turn=asked,
            start_s=turn.chunks[0].start,
            stop_s=turn.chunks[-1].stop,
            frames=turn.frames,
            dropped_frames=mailbox.dropped(),
            chunks=len(conversation.chunks),
            forgotten_chunks=forgotten,
            new_tokens=answer.prompt_tokens - last_tokens if answer else None,
            prompt_tokens=answer.prompt_tokens if answer else None,
            max_model_len=client.max_model_len,
            cached_tokens=answer.cached_tokens if answer else None,
            output_tokens=answer.output_tokens if answer else None,
            ttft_s=number(answer.ttft_s) if answer else None,
            answer=answer.text if answer else "".join(pieces),
            complete=answer is not None,
        )
        report.turn(row)
        if answer is None:
            return "stopped"
        conversation.answered(answer.text)
        last_tokens = answer.prompt_tokens
