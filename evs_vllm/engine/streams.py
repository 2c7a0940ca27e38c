# SPDX-License-Identifier: Apache-2.0
"""The videos of a request as parts of one stream: which came before each, and what those left behind.

What a video of a stream keeps depends on the pixels of all videos before it, on the settings, and on nothing else. So
its cache identity holds the chain of theirs (`chain`), and what they left (`Anchors`) can be kept (`StreamStore`) or
made again from the request's own videos, with the same result.

In an engine session each input is a prompt of its own, with its own videos alone. Its first one goes on from the video
whose cache identity the request gives (``evs_after``): a name of all that came before, so the plans are those that one
request with all the videos would get. What that video left has to be kept still; otherwise the input is refused.
"""

import hashlib
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from evs_vllm.core.clip import Anchors
from evs_vllm.errors import RequestError

_OVERHEAD = 512
"""Bytes of an entry beside its anchors: keys, objects and the table's share."""


def chain(hashes: Sequence[str], identity: str, after: str | None = None) -> list[str]:
    """What stands before each video of a stream, and after the last.

    Args:
        hashes: The n videos' own, in order.
        identity: Of the settings.
        after: The cache identity of the video that the first one goes on from; None for a stream that begins here.

    Returns:
        n + 1 digests; number k is one of the settings and of all videos before number k.
    """
    links = [_link(identity, after or "")]
    for each in hashes:
        links.append(_link(identity, cache_identity(each, links[-1])))
    return links


def cache_identity(own: str, mark: str) -> str:
    """The cache identity of a video that is pruned: its own hash, and a digest of what else decides what it keeps."""
    return f"{own}-evs{mark}"


def looks_pruned(own: str) -> bool:
    """Whether a video's own hash, which a client may choose, is spelled like a `cache_identity`."""
    return re.search(r"-evs[0-9a-f]{16,32}$", own) is not None


def _link(identity: str, after: str) -> str:
    # Digests have one length, so no two chains are spelled alike.
    return hashlib.sha256(f"{hashlib.sha256(identity.encode()).hexdigest()}{after}".encode()).hexdigest()[:32]


class StreamStore:
    """What streams left, by the digest of all that led to it; when it is full, what was used least lately goes.

    Args:
        capacity: Bytes.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.size = capacity, 0
        self._entries: OrderedDict[str, Anchors] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, link: str) -> Anchors | None:
        """What was put under a digest, if it is still there."""
        with self._lock:
            if link in self._entries:
                self._entries.move_to_end(link)
            return self._entries.get(link)

    def put(self, link: str, anchors: Anchors) -> None:
        """Keeps what is left under a digest, if it fits at all."""
        size = _size_of(anchors)
        with self._lock:
            if (old := self._entries.pop(link, None)) is not None:
                self.size -= _size_of(old)
            if size > self.capacity:
                return
            self._entries[link] = anchors
            self.size += size
            while self.size > self.capacity:
                self.size -= _size_of(self._entries.popitem(last=False)[1])


def _size_of(anchors: Anchors) -> int:
    return anchors.looks.numel() + _OVERHEAD


@dataclass
class Stream:
    """The stream of the request that is being processed.

    Attributes:
        store: Where anchors are kept.
        after: The cache identity of the video that the first one goes on from, or None.
        links: As from `chain`; empty before the videos' hashes are known.
        missing: Which videos are being processed, in order; None for all.
        rebuilt: Those of them that the processor cache has.
        before: What is known of the anchors before each video.
    """

    store: StreamStore
    after: str | None = None
    links: list[str] = field(default_factory=list)
    missing: list[int] | None = None
    rebuilt: frozenset[int] = frozenset()
    before: dict[int, Anchors | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.after is None:
            self.before[0] = None

    def anchors_before(self, number: int) -> Anchors | None:
        """What was left before a video that is being processed.

        Raises:
            RequestError: The video that the first one goes on from is not known here, or what it left is gone.
        """
        if number not in self.before:
            self.before[number] = self.store.get(self.links[number])
            if self.before[number] is None:
                raise RequestError(
                    f"evs_after names the video {self.after!r}, and what it left for the videos after it is not at "
                    "hand: no such video was planned here as part of a stream with these evs_* settings, or other "
                    "streams took its place (--evs-stream-cache-gb), or the engine was restarted. Give the identity "
                    "of the session's last video, with the settings that it had, or begin a new stream: leave "
                    "evs_after out, and the video is kept as the first one of a stream."
                )
        return self.before[number]

    def without(self, cache: Any, items: Any, hashes: Sequence[str]) -> Any:
        """The processor cache to be asked which videos are missing.

        A video that is missing needs what those before it left. Where the store has that no more, the video before
        passes for missing, too.

        Args:
            cache: vLLM's.
            items: The request's videos.
            hashes: Their cache identities.

        Raises:
            RequestError: A video that has to be processed again came without its data.
        """
        cached = cache.is_cached(list(hashes))
        needed = {number for number, found in enumerate(cached) if not found}
        for number in range(len(cached) - 1, 0, -1):
            if number not in needed:
                continue
            if (anchors := self.store.get(self.links[number])) is not None:
                self.before[number] = anchors
                continue
            needed.add(number - 1)
            if cached[number - 1] and items[number - 1] is None:
                raise RequestError(
                    f"Video {number} of this stream came as an identifier without its data, and what it left for the "
                    "videos after it is not at hand any more (the server was restarted, or other streams took its "
                    "place: --evs-stream-cache-gb). Send the data of all videos again, or begin a new stream with "
                    "fewer of them."
                )
        if 0 in needed:
            self.anchors_before(0)
        self.missing = sorted(needed)
        self.rebuilt = frozenset(number for number in needed if cached[number])
        return _Without(cache, frozenset(hashes[number] for number in self.rebuilt))

    def number_of(self, place: int) -> int:
        """Which video of the request is the one at a place among those being processed."""
        return place if self.missing is None else self.missing[place]

    def leave(self, number: int, anchors: Anchors | None) -> None:
        """Notes what a video left; None where it is no clip (precomputed embeddings)."""
        self.before[number + 1] = anchors
        if anchors is not None:
            self.store.put(self.links[number + 1], anchors)


@dataclass(frozen=True)
class _Without:
    """A processor cache to whom some items are unknown."""

    cache: Any
    absent: frozenset[str]

    def is_cached(self, hashes: list[str]) -> list[bool]:
        found = self.cache.is_cached(hashes)
        return [known and each not in self.absent for known, each in zip(found, hashes, strict=True)]
