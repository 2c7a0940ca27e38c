# SPDX-License-Identifier: Apache-2.0
"""Thousands of random requests to one server with two API server processes: is every answer what it has to be, are
answers the same at the end, and does memory stay flat?

    python -m bench.soak                   # 10,000 requests
    python -m bench.soak --smoke           # 120 of them: does it work? Says nothing about memory

A request counts as wrong if it is answered with another status than it has to be (200; 400 for bad settings; those that
hang up are not judged), or if a request that was asked at the start is answered otherwise later. Memory is the
proportional set size (what is shared counts once) of all of the server's processes, sampled between requests.
"""

import argparse
import collections
import os
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil

from bench.common import harness
from bench.soak.requests import Asked, Requests
from evs_vllm import serving
from evs_vllm.testing import make_model

PROBES = 6
"""Requests that are asked again and again: at the start, after every tenth of the others, and at the end."""

ANSWERED = ("clip", "clips", "picture", "stream")
"""Kinds that have to be answered."""

OPTIONS = [
    "--enforce-eager", "--dtype=float32", "--max-model-len=8192", "--max-num-seqs=8", "--seed=0",
    "--api-server-count=2", '--limit-mm-per-prompt={"video": 8, "image": 2}', "--mm-processor-cache-gb=0.05",
    "--evs-rate=0.5", "--evs-request-overrides=any", "--evs-stream-cache-gb=0.01",
]  # fmt: skip
"""Small caches, so that they fill and evict."""


def main() -> int:
    """Parses the command line, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--smoke", action="store_const", const=120, dest="requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--at-once", type=int, default=4, help="requests in flight")
    parser.add_argument("--out", type=Path, help="result file (JSON); by default nothing is written")
    args = parser.parse_args()
    environment = harness.environment()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model", "qwen2_5_vl")
        env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **os.environ}
        command = serving.vllm_serve([str(model), *OPTIONS])
        with serving.stoppable(), serving.starting(command, folder / "log.txt", env) as (url, process):
            serving.wait_until_healthy(url, process, timeout_s=600)
            found = soak(url, process.pid, args.requests, args.seed, args.at_once)
        found["tracebacks"] = (folder / "log.txt").read_text(errors="replace").count("Traceback")
    print(summary(found))
    if args.out:
        harness.write({"benchmark": "soak", "environment": environment, "options": OPTIONS, **found}, args.out)
    return 1 if found["wrong"] or found["tracebacks"] else 0


def soak(url: str, pid: int, count: int, seed: int, at_once: int) -> dict[str, Any]:
    """Sends the requests and watches; the content of the result file."""
    source, lock = Requests(seed), threading.Lock()
    statuses: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    memory: list[tuple[int, float]] = []
    probes = [asked for number in range(10**6, 10**6 + 200) if (asked := source.make(number)).kind in ANSWERED][:PROBES]
    first = [post(url, each.body).json()["choices"][0]["message"]["content"] for each in probes]

    def one(number: int) -> None:
        asked = source.make(number)
        try:
            status: int | str = hang_up(url, asked) if asked.kind == "abort" else post(url, asked.body).status_code
        except httpx.HTTPError as error:
            status = type(error).__name__
        with lock:
            statuses[f"{asked.kind}: {status}"] += 1
            if asked.kind != "abort" and status != (400 if asked.kind == "refused" else 200):
                wrong.append(f"request {number} ({asked.kind}): HTTP {status}")

    started, step = time.monotonic(), max(1, count // 10)
    with ThreadPoolExecutor(at_once) as pool:
        for begin in range(0, count, step):
            list(pool.map(one, range(begin, min(begin + step, count))))
            for place, (each, answer) in enumerate(zip(probes, first, strict=True)):
                response = post(url, each.body)
                if response.status_code != 200 or response.json()["choices"][0]["message"]["content"] != answer:
                    wrong.append(f"probe {place} is answered otherwise after {begin + step} requests")
            memory.append((min(begin + step, count), proportional_bytes(pid) / 2**20))
    return {
        "requests": count,
        "seconds": time.monotonic() - started,
        "statuses": dict(sorted(statuses.items())),
        "wrong": wrong,
        "memory_mib": memory,
    }


def post(url: str, body: dict[str, Any]) -> httpx.Response:
    """The answer to a chat request, over a connection of its own, so that any API server process gets it."""
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300, trust_env=False)


def hang_up(url: str, asked: Asked) -> str:
    """Asks for a long answer and hangs up: soon, or at the first token."""
    body = {**asked.body, "stream": True, "max_tokens": 400}
    patience = 0.02 if body["messages"][0]["content"][1]["text"].endswith(("1?", "3?", "5?")) else 300.0
    try:
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body, timeout=patience, trust_env=False
        ) as response:
            next(response.iter_raw())
            return "hung up at the first token"
    except httpx.TimeoutException:
        return "hung up before"


def proportional_bytes(pid: int) -> float:
    """Memory of a process and all its children, of which shared pages are counted once."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return float(sum(each.memory_full_info().pss for each in family))


def summary(found: dict[str, Any]) -> str:
    """What came of it, in lines for a person."""
    sizes = [size for _, size in found["memory_mib"]]
    half = len(sizes) // 2
    lines = [f"{found['requests']} requests in {found['seconds']:.0f} s; {found['tracebacks']} tracebacks in the log"]
    lines += [f"  {name}: {number}" for name, number in found["statuses"].items()]
    lines += [f"memory, MiB: {', '.join(f'{size:.0f}' for size in sizes)}"]
    if half:
        early, late = statistics.median(sizes[1:half] or sizes[:1]), statistics.median(sizes[half:])
        lines += [f"second half against first: {100 * (late / early - 1):+.1f} %"]
    return "\n".join([*lines, *(found["wrong"] or ["nothing was wrong"])])


if __name__ == "__main__":
    sys.exit(main())
