# SPDX-License-Identifier: Apache-2.0
"""The servers of one run: what each row is, keeping several alive side by side, their memory and their counters.

An idle vLLM server costs about one hundredth of a core here, so the rows of a run can take turns request by request,
and a drift of the machine meets all of them alike.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evs_vllm.errors import EVSError
from evs_vllm.serving import metrics, starting, tail, vllm_serve, wait_until_healthy

HERE = Path(__file__).resolve().parent
ROWS = ("vanilla", "stock", "evs-full", "evs-reuse", "evs-off")
STOCK_NOTE = "vLLM's CPU engine crashes with --video-pruning-rate; this row runs with the missing flag set by the bench"

START_S = 1200.0
"""How long a server may take to start."""

UNCACHED = ("--no-enable-prefix-caching", "--mm-processor-cache-gb", "0")
CACHED = ("--enable-prefix-caching", "--mm-processor-cache-gb", "1")


@dataclass(frozen=True)
class Server:
    """One server: a name that is unique in a run, its own arguments of ``vllm serve``, its vLLM plugins."""

    name: str
    arguments: tuple[str, ...]
    plugins: tuple[str, ...]


def server_of(row: str, rate: float, device: str, *, cached: bool = False, stages: bool = False) -> Server:
    """The server that a row needs. Rows with the plugin share one, for any rate: their requests differ."""
    if row not in ROWS:
        raise EVSError(f"unknown row {row!r}; allowed: {', '.join(ROWS)}")
    arguments = CACHED if cached else UNCACHED
    plugins: tuple[str, ...] = ()
    if row == "vanilla":
        name = "vanilla"
    elif row == "stock":
        name = f"stock-{rate:g}"
        arguments += ("--video-pruning-rate", f"{rate:g}")
        plugins = ("evs_bench_stock_flag",) if device == "cpu" else ()
    else:
        name = "evs"
        arguments += ("--evs-rate", "0.75", "--evs-request-overrides", "any")
        plugins = ("evs",)
    if stages:
        plugins += ("evs_bench_stage_times",)
    suffix = "-cached" * cached + "-stages" * stages
    return Server(name + suffix, arguments, plugins)


def request_options(row: str, rate: float) -> dict[str, Any]:
    """What a row puts into a request's ``mm_processor_kwargs``."""
    if row in ("vanilla", "stock"):
        return {}
    if row == "evs-off":
        return {"evs_rate": 0.0}
    return {"evs_rate": rate, "evs_encoder": row.removeprefix("evs-")}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Words of a command line: True is a flag alone, a mapping is JSON."""
    words = []
    for name, value in options.items():
        if value is not False:
            words.append(f"--{name}")
        if not isinstance(value, bool):
            words.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return words


@dataclass
class Live:
    """A server that answers."""

    server: Server
    url: str
    process: subprocess.Popen[bytes]
    stack: contextlib.ExitStack
    """Closing it ends the process group."""

    def planning(self) -> tuple[float, float]:
        """Seconds spent planning and clips planned, by the plugin's own metric; zeros without the plugin."""
        try:
            found = metrics(self.url)
        except OSError:  # it just died: the requests tell
            return 0.0, 0.0
        return found.get("evs:planning_time_seconds_sum", 0.0), found.get("evs:planning_time_seconds_count", 0.0)

    def reset_peak_memory(self) -> bool:
        """Starts the peak of every process anew; False where the system does not allow it."""
        try:
            for process in _processes(self.process.pid):
                (process / "clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def peak_memory_mb(self) -> float:
        """Largest resident size of each of the server's processes, added up."""
        total = 0
        for process in _processes(self.process.pid):
            with contextlib.suppress(OSError):
                found = re.search(r"VmHWM:\s+(\d+) kB", (process / "status").read_text())
                total += int(found[1]) if found else 0
        return total / 1024


class Pool:
    """Servers by name, at most `limit` alive: each costs memory, so those that are not needed next make room."""

    def __init__(
        self, model: str, arguments: Sequence[str], env: Mapping[str, str], folder: Path, limit: int, together: bool
    ) -> None:
        """
        Args:
            model: folder or name for ``vllm serve``.
            arguments: for all servers.
            env: for all servers.
            folder: for logs.
            limit: servers alive at a time.
            together: start the servers of a cell at the same time; wrong where they measure free memory (GPU).
        """
        self._model, self._arguments, self._env = model, list(arguments), dict(env)
        self._folder, self._limit, self._together = folder, limit, together
        self._live: dict[str, Live] = {}
        self.failed: dict[str, str] = {}
        _announce_plugins(folder)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self, keep: Sequence[str] = ()) -> None:
        """Ends all servers but those in `keep`."""
        for name in [name for name in self._live if name not in keep]:
            self._live.pop(name).stack.close()

    def need(self, servers: Sequence[Server]) -> list[Live]:
        """Makes sure that these are alive; one that cannot start is in `failed` from then on, and not tried again.

        Returns:
            Those that were started now: they are cold.

        Raises:
            EVSError: `limit` is too low.
        """
        wanted = {server.name: server for server in servers if server.name not in self.failed}
        if len(wanted) > self._limit:
            raise EVSError(f"{len(wanted)} servers are needed at a time and max_servers is {self._limit}")
        dead = [name for name, live in self._live.items() if live.process.poll() is not None]
        self.stop(keep=[name for name in self._live if name not in dead])
        if len(wanted.keys() | self._live.keys()) > self._limit:
            self.stop(keep=list(wanted))
        missing = [server for name, server in wanted.items() if name not in self._live]
        for batch in [missing] if self._together else [[server] for server in missing]:
            for server in batch:
                self._start(server)
            for server in batch:
                live = self[server.name]
                try:
                    wait_until_healthy(live.url, live.process, START_S)
                except EVSError:
                    print(f"the end of {self.log(server)}:", *tail(self.log(server)), sep="\n  | ", file=sys.stderr)
                    self.failed[server.name] = f"the server {server.name!r} did not start"
                    self._live.pop(server.name).stack.close()
        return [self[server.name] for server in missing if server.name not in self.failed]

    def __contains__(self, name: str) -> bool:
        return name in self._live

    def __getitem__(self, name: str) -> Live:
        return self._live[name]

    def log(self, server: Server) -> Path:
        return self._folder / f"{server.name}.log"

    def stages_file(self, server: Server) -> Path:
        return self._folder / f"{server.name}.jsonl"

    def command(self, server: Server) -> list[str]:
        """The words after ``vllm serve``."""
        return [self._model, *self._arguments, *server.arguments]

    def _start(self, server: Server) -> None:
        own = {"VLLM_PLUGINS": ",".join(server.plugins), "EVS_BENCH_STAGES": str(self.stages_file(server))}
        paths = [str(self._folder / "plugins"), str(HERE / "serverside"), self._env.get("PYTHONPATH", "")]
        # The installed packages are measured, not what happens to lie in the current folder.
        env = self._env | own | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
        stack = contextlib.ExitStack()
        url, process = stack.enter_context(starting(vllm_serve(self.command(server)), self.log(server), env))
        self._live[server.name] = Live(server, url, process, stack)


def _processes(group: int) -> Iterator[Path]:
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError, ProcessLookupError):
                if os.getpgid(int(folder.name)) == group:
                    yield folder


def _announce_plugins(folder: Path) -> None:
    """vLLM finds plugins by the metadata of installed packages; this is such metadata, and nothing is installed."""
    info = folder / "plugins" / "evs_bench_serverside-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: evs-bench-serverside\nVersion: 0\n")
    names = "\n".join(f"evs_bench_{name} = evs_bench_serverside:{name}" for name in ("stock_flag", "stage_times"))
    (info / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{names}\n")
