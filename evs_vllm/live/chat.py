# SPDX-License-Identifier: Apache-2.0
"""The conversation: what is sent each turn. Its beginning is the same from turn to turn, so that caches hit."""

from typing import Any

from evs_vllm.errors import EVSError
from evs_vllm.live.chunks import Chunk, Turn
from evs_vllm.serving import video_part


class Conversation:
    """All chunks so far and the question.

    Without `history` it is one message: the chunks in order, and the question after them. Each turn only adds chunks
    before the question, so a prompt begins with all that the last one had but the question, and no answer depends on
    an earlier one. With `history` each turn is a message with its chunks and the question, followed by its answer.

    Args:
        question: Asked in every turn.
        history: Keeps questions and answers.
        keep_s: Seconds of video to keep at most, or None for all. When there are more, the oldest turns are dropped
            until half is left: each time the server has to compute what stays anew, so it should be seldom.

    Raises:
        EVSError: `keep_s` is not above 0.
    """

    def __init__(self, question: str, history: bool = False, keep_s: float | None = None) -> None:
        if keep_s is not None and not keep_s > 0:
            raise EVSError(f"--keep-seconds got {keep_s:g}; allowed: a number above 0.")
        self._question, self._history, self._keep_s = question, history, keep_s
        self._turns: list[Turn] = []
        self._answers: list[str] = []  # of all turns but, while it is asked about, the last one
        self.forgotten = 0
        """Chunks that were dropped so far."""

    @property
    def chunks(self) -> list[Chunk]:
        """The chunks that the next request has."""
        return [chunk for turn in self._turns for chunk in turn.chunks]

    @property
    def seconds(self) -> float:
        """Seconds of video in the next request."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks)

    def add(self, turn: Turn) -> int:
        """Adds a turn and returns how many of the oldest chunks were dropped for it; the turn itself always stays."""
        self._turns.append(turn)
        if self._keep_s is None or self.seconds <= self._keep_s:
            return 0
        before = len(self.chunks)
        while len(self._turns) > 1 and self.seconds > self._keep_s / 2:
            del self._turns[0], self._answers[:1]
        self.forgotten += before - len(self.chunks)
        return before - len(self.chunks)

    def answered(self, answer: str) -> None:
        """Notes the answer to the last turn."""
        self._answers.append(answer)

    def messages(self) -> list[dict[str, Any]]:
        """The messages of a chat request about the last turn."""
        if not self._history:
            return [self._message(self.chunks)]
        messages = []
        for turn, answer in zip(self._turns, [*self._answers, None]):
            messages.append(self._message(list(turn.chunks)))
            if answer is not None:
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _message(self, chunks: list[Chunk]) -> dict[str, Any]:
        videos = [video_part(chunk.url) for chunk in chunks]
        return {"role": "user", "content": [*videos, {"type": "text", "text": self._question}]}
