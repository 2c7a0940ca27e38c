# SPDX-License-Identifier: Apache-2.0
"""Which requests share cached work, for whoever spreads requests over several servers.

A server keeps what it made of a prompt's beginning: processed clips, what streams left, encoder rows, KV blocks. Two
requests can share it as far as their contents are alike from the start and their settings are the same.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

SETTINGS = (
    "model",
    "mm_processor_kwargs",
    "media_io_kwargs",
    "chat_template",
    "chat_template_kwargs",
    "tools",
    "cache_salt",
)
"""Keys of a chat request that change what its contents become, all of them."""


def prefix_chain(body: Mapping[str, Any]) -> list[str]:
    """Digests of the beginnings of a chat request, the longer the further on.

    Args:
        body: The request, as it is sent. Of media it is what stands there that counts: data, a URL or a uuid.

    Returns:
        n + 1 digests for n parts of content (a text, a clip...); number k is one of the settings and of parts 0 to
        k - 1. Requests that agree up to there, and no others, have it in common.
    """
    links = [_digest({name: body.get(name) for name in SETTINGS})]
    for role, part in _parts(body):
        links.append(_digest([links[-1], role, part]))
    return links


def routing_key(body: Mapping[str, Any]) -> str:
    """The digest of a chat request up to and with its first medium: the same for all turns of a conversation that
    begins with it, and for all questions about it that are asked in the same words before it. Of a request without
    media, up to and with its first message of a user.

    Routers that keep a session with a server by a header can be given this as the session.
    """
    links, user = prefix_chain(body), 0
    for number, (role, part) in enumerate(_parts(body), 1):
        if isinstance(part, Mapping) and part.get("type") != "text":
            return links[number]
        user = user or (number if role == "user" else 0)
    return links[user]


def _parts(body: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each part of the content with the role of its message."""
    for message in body.get("messages") or ():
        content = message.get("content")
        for part in content if isinstance(content, list) else [content]:
            yield str(message.get("role")), part


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
