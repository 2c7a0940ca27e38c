# SPDX-License-Identifier: Apache-2.0
"""The figures, tables and bars of a result file of `bench.stream`. Nothing is measured here."""

import statistics
from functools import partial
from typing import Any

from bench.common.clips import FPS, TOKEN
from bench.common.tables import markdown
from bench.common.targets import add_bar
from bench.stream.run import BY_NAME, RESEND, VANILLA

STILL = "nothing happens"


def later(played: dict[str, Any]) -> list[dict[str, Any]]:
    """The turns after the first, in which there is something to go on from."""
    return [turn for turn in played["turns"] if turn["number"]]


def ttft(played: dict[str, Any]) -> float:
    """Median over the turns after the first."""
    return statistics.median(turn["ttft_s"] for turn in later(played))


def new_share(played: dict[str, Any], size: tuple[int, int]) -> float:
    """Share of a chunk's tokens that stay, median over the turns after the first."""
    whole = played["frames"] // 2 * (size[0] // TOKEN) * (size[1] // TOKEN)
    return statistics.median(turn["new_tokens"] for turn in later(played)) / whole


def growth(played: dict[str, Any]) -> float:
    """TTFT of the last third of the turns after the first over that of the first third, medians."""
    times = [turn["ttft_s"] for turn in later(played)]
    third = max(1, len(times) // 3)
    return statistics.median(times[-third:]) / statistics.median(times[:third])


def find(content: dict[str, Any], scene: str, frames: int, row: str) -> dict[str, Any] | None:
    """A row's stream, if it has figures."""
    for played in content["results"]:
        if (played["scene"], played["frames"], played["row"]) == (scene, frames, row) and not played["error"]:
            return dict(played)
    return None


def bars(content: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar that the file has figures for: the worst of its scenes."""
    config = content["config"]
    found: list[dict[str, Any]] = []
    add = partial(add_bar, found)
    size, longest = config["frame_size"], max(config["chunks"])
    for rate, how in [(rate, "") for rate in config["rates"]] + [(rate, BY_NAME) for rate in config["rates"]]:
        name, factors, contexts, grown = f"evs stream {rate:g}{how}", [], [], []
        for scene in config["scenes"]:
            ours, vanilla = (find(content, scene, longest, row) for row in (name, VANILLA + how))
            if ours is None or vanilla is None:
                continue
            factors.append(ttft(vanilla) / ttft(ours))
            contexts.append(vanilla["turns"][-1]["prompt_tokens"] / ours["turns"][-1]["prompt_tokens"])
            grown.append(growth(ours) / growth(vanilla))
        if not factors:
            continue
        add(f"TTFT against vanilla with prefix caching, {longest} frames, rate {rate:g}{how}", min(factors), 3.0)
        add(f"growth of a turn's TTFT over the stream, against vanilla's, rate {rate:g}{how}", max(grown), None)
        if how:
            continue
        add(f"context used against vanilla, {longest} frames, rate {rate:g}", min(contexts), 4.0)
        for frames in config["chunks"]:
            if (still := find(content, STILL, frames, name)) is not None:
                share = 100 * new_share(still, size)
                add(
                    f"a still scene's chunk of {frames} frames keeps, rate {rate:g}",
                    share,
                    5.0,
                    at_most=True,
                    unit=" %",
                )
    return found


def table(content: dict[str, Any]) -> str:
    """A Markdown table of all streams."""
    lines, size = [], content["config"]["frame_size"]
    for played in content["results"]:
        what = [played["scene"], f"{played['frames']} ({played['frames'] / FPS:g} s)", played["row"]]
        if played["error"]:
            lines.append([*what, f"no figure: {played['error']}"])
            continue
        last = played["turns"][-1]
        share = "" if played["row"] == RESEND else f"{100 * new_share(played, size):.1f} %"
        cached = f"{100 * last['cached_tokens'] / last['prompt_tokens']:.0f} %"
        lines.append([*what, f"{ttft(played):.2f}", f"{last['ttft_s']:.2f}", str(last["prompt_tokens"]), cached, share])
    head = ("scene", "chunk", "row", "TTFT s", "last turn's", "context at the end", "of it cached", "new of a chunk")
    return "\n".join(markdown(head, lines, "lllr"))
