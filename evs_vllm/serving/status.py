# SPDX-License-Identifier: Apache-2.0
"""What a server says of itself: its pages, whether it is healthy, its counters."""

import http.client
import re
import urllib.parse
import urllib.request
from collections.abc import Mapping
from typing import Any

# Of a metric: its name, labels in quotes that may hold anything, its value, a time.
_SAMPLE = re.compile(
    r'([A-Za-z_:][\w:]*)(?:\{((?:[^"}]|"(?:\\.|[^"\\])*")*)\})?'
    r"\s+([+-]?(?:[\d.]+(?:[eE][+-]?\d+)?|Inf|NaN))(?:\s+-?\d+)?"
)
_LABEL = re.compile(r'([A-Za-z_]\w*)\s*=\s*"((?:\\.|[^"\\])*)"')
_ESCAPED = {"n": "\n"}


def is_local(url: str) -> bool:
    """Whether a URL points to this machine: a proxy of the environment has no business on the way there."""
    return urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")


def open_url(request: urllib.request.Request, timeout_s: float) -> Any:
    """The open response to a request, without the environment's proxies where the server is on this machine."""
    proxies = urllib.request.ProxyHandler({} if is_local(request.full_url) else None)
    return urllib.request.build_opener(proxies).open(request, timeout=timeout_s)


def read_url(url: str, timeout_s: float = 30.0, headers: Mapping[str, str] | None = None) -> str:
    """The text at `url`; `headers` go along with the request.

    Raises:
        OSError: Nobody answers, or not with the code 200.
    """
    try:
        with open_url(urllib.request.Request(url, headers=dict(headers or {})), timeout_s) as answer:
            text: str = answer.read().decode()
    except http.client.HTTPException as error:
        raise OSError(f"{url}: {error!r}") from error
    return text


def healthy(url: str) -> bool:
    """Whether the server at `url` is ready for requests."""
    try:
        read_url(f"{url}/health", timeout_s=5)
        return True
    except (OSError, UnicodeDecodeError):
        return False


def metrics(url: str) -> dict[str, float]:
    """What the server's ``/metrics`` says now, as `parse_metrics` reads it.

    Raises:
        OSError: It does not answer, or shows no metrics.
    """
    return parse_metrics(read_url(f"{url}/metrics"))


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus' text format by name, summed over their labels.

    The sum and the count of a histogram are samples of their own; its buckets, which overlap, are left out.
    """
    found: dict[str, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.fullmatch(line.strip())
        if sample is not None and not sample[1].endswith("_bucket"):
            found[sample[1]] = found.get(sample[1], 0.0) + float(sample[3])
    return found


def parse_info(text: str, name: str) -> list[dict[str, str]]:
    """The labels of each series of the metric `name` that is not 0, in Prometheus' text format."""
    samples = (_SAMPLE.fullmatch(line.strip()) for line in text.splitlines())
    return [
        {key: re.sub(r"\\(.)", lambda m: _ESCAPED.get(m[1], m[1]), value) for key, value in _LABEL.findall(s[2] or "")}
        for s in samples
        if s is not None and s[1] == name and float(s[3])
    ]
