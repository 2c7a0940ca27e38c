# SPDX-License-Identifier: Apache-2.0
"""What the user sees: a line or a JSON object a turn, notices, the summary."""

import json
import math
import statistics
import sys
from dataclasses import asdict, dataclass
from typing import TextIO

from evs_vllm.text import percent, seconds

HEAD = f"{'time':>9}  {'new':>7}  {'context used':>22}  {'cached':>7}  {'TTFT':>8}  {'dropped':>7}  answer"


@dataclass(frozen=True)
class Row:
    """One turn. None is what is not known.

    Attributes:
        turn: Its number, from 1.
        start_s: Where its new video begins in the stream, in seconds.
        stop_s: Where it ends.
        frames: Frames of the new chunks.
        dropped_frames: Frames that were taken from the source since the last turn, and sent in none.
        chunks: Chunks in the conversation.
        forgotten_chunks: Oldest chunks that were dropped from it for this turn.
        new_tokens: How much longer the prompt is than that of the last turn; negative where chunks were forgotten.
        prompt_tokens: Length of the prompt.
        max_model_len: What fits.
        cached_tokens: Tokens of the prompt that the server had in its prefix cache.
        output_tokens: Length of the answer.
        ttft_s: Seconds from sending the request to the answer's first text.
        answer: The answer.
        complete: Whether the answer was heard to its end.
    """

    turn: int
    start_s: float
    stop_s: float
    frames: int
    dropped_frames: int
    chunks: int
    forgotten_chunks: int
    new_tokens: int | None
    prompt_tokens: int | None
    max_model_len: int | None
    cached_tokens: int | None
    output_tokens: int | None
    ttft_s: float | None
    answer: str
    complete: bool = True

    def line(self) -> str:
        """The turn for a person; "-" is what is not known."""
        new, cached, used = "-", "-", "-"
        if self.new_tokens is not None:
            new = f"{self.new_tokens:+d}"
        if self.cached_tokens is not None:
            cached = str(self.cached_tokens)
        if self.prompt_tokens is not None:
            used = str(self.prompt_tokens)
            if self.max_model_len:
                used += f" of {self.max_model_len} ({percent(self.prompt_tokens / self.max_model_len)})"
        ttft = "-" if self.ttft_s is None else seconds(self.ttft_s)
        words = " ".join(self.answer.split()) + ("" if self.complete else " [interrupted]")
        return f"{self.stop_s:7.1f} s  {new:>7}  {used:>22}  {cached:>7}  {ttft:>8}  {self.dropped_frames:>7}  {words}"


class Report:
    """Prints turns to `out` as they come, and everything else to `err`.

    Args:
        as_json: One JSON object a turn instead of a line; the summary then goes to `err`, too.
        out: Standard output by default.
        err: Standard error by default.
    """

    def __init__(self, as_json: bool = False, out: TextIO | None = None, err: TextIO | None = None) -> None:
        self._json = as_json
        self._out, self._err = out or sys.stdout, err or sys.stderr
        self._rows = 0
        self._dropped = 0
        self._last_s = 0.0
        self._tokens: int | None = None
        self._ttfts: list[float] = []

    def begin(self, text: str) -> None:
        """Says what is about to happen, and what the columns are."""
        self.notice(text)
        if not self._json:
            self._print(HEAD)

    def turn(self, row: Row) -> None:
        """Prints a turn."""
        self._rows += 1
        self._dropped += row.dropped_frames
        self._last_s = row.stop_s
        self._tokens = row.prompt_tokens if row.prompt_tokens is not None else self._tokens
        self._ttfts += [] if row.ttft_s is None else [row.ttft_s]
        self._print(json.dumps(asdict(row)) if self._json else row.line())

    def notice(self, text: str) -> None:
        """Prints a sentence that belongs to no turn."""
        print(text, file=self._err, flush=True)

    def end(self, why: str, dropped: int, forgotten: int) -> None:
        """Prints the summary.

        Args:
            why: What ended the session.
            dropped: Frames that were dropped after the last turn.
            forgotten: Chunks that were dropped from the conversation.
        """
        parts = [f"{why}: {self._rows} turn(s), {self._last_s:.1f} s of video"]
        if self._tokens is not None:
            parts.append(f"{self._tokens} prompt tokens in the last turn")
        if self._ttfts:
            parts.append(f"median TTFT {seconds(statistics.median(self._ttfts))}")
        parts.append(f"{self._dropped + dropped} frame(s) dropped")
        if forgotten:
            parts.append(f"{forgotten} oldest chunk(s) forgotten")
        text = ", ".join(parts)
        if self._json:
            self.notice(text)
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        print(text, file=self._out, flush=True)


def number(value: float) -> float | None:
    """A number that JSON has, or None for NaN."""
    return None if math.isnan(value) else value
