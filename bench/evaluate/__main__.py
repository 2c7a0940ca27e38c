# SPDX-License-Identifier: Apache-2.0
"""What pruning costs in answers, on real benchmarks: lmms-eval's tasks against a running server, at a list of rates.

Start a server that prunes what each request asks for, then evaluate:

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --evs-rate 0 --evs-request-overrides any
    python -m bench.evaluate configs/eval/videomme.yaml --out bench/results/gpu/videomme

writes videomme.json and .md after every step, and .svg; ``--resume`` goes on where a run stopped. Needs no vLLM and no
GPU of its own: ``pip install "evs-vllm[eval]"``, best in an environment of its own.
"""

import argparse
import importlib.metadata
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bench.common import harness
from bench.evaluate.report import Point, brief, markdown, plot
from evs_vllm.errors import EVSError

if TYPE_CHECKING:
    from bench.evaluate.client import Client
    from bench.evaluate.lmms import Scored, Tasks

SCHEMA = 1
INSTALL = 'pip install "evs-vllm[eval]" (it needs no vLLM: an environment of its own is best)'


@dataclass
class Settings:
    """A file of configs/eval. Every key but `tasks` has a default.

    Attributes:
        tasks: names of lmms-eval's tasks or groups, or ``{name: [tasks]}``: a group of your choice, of which the plain
            mean is shown.
        rates: which are asked for, besides 0.
        variants: by name, further ``mm_processor_kwargs`` of pruned requests, such as ``{"evs_encoder": "full"}``. Each
            is asked at each rate.
        url: the server.
        model: the name it serves; may be left out where it serves one.
        limit: questions of each task; None is all.
        concurrency: requests in flight.
        video_as: "data" sends files, "file" their paths (``--allowed-local-media-path`` of the server).
        body: further fields of each request, such as ``{"media_io_kwargs": {"video": {"num_frames": 32}}}``.
        max_tokens: of each answer, instead of what the task says; for models that think first.
        timeout_s: for a request.
        prompts: which of a task's ways to ask (its ``lmms_eval_specific_kwargs``).
        task_folders: with task files beside lmms-eval's own; relative to the settings.
    """

    tasks: list[str | dict[str, list[str]]]
    rates: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9])
    variants: dict[str, dict[str, Any]] = field(default_factory=lambda: {"default": {}})
    url: str = "http://127.0.0.1:8000"
    model: str | None = None
    limit: int | None = None
    concurrency: int = 8
    video_as: str = "data"
    body: dict[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    timeout_s: float = 1800.0
    prompts: str = "default"
    task_folders: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rates = [0.0, *sorted({float(rate) for rate in self.rates} - {0.0})]
        if not self.tasks:
            raise EVSError("tasks: at least one")
        if not all(0 <= rate < 1 for rate in self.rates):
            raise EVSError(f"rates got {self.rates}; each must be from 0 up to but not including 1")
        if self.concurrency < 1 or (self.limit is not None and self.limit < 1):
            raise EVSError("concurrency and limit: at least 1")
        if "mm_processor_kwargs" in self.body:
            raise EVSError("body: mm_processor_kwargs are made of rates and variants")
        for name, options in self.variants.items():
            if not isinstance(options, Mapping) or "evs_rate" in options:
                raise EVSError(f"variants: {name!r} must be a mapping of evs_* keys without evs_rate, got {options!r}")

    @property
    def groups(self) -> dict[str, list[str]]:
        """What is shown as one, by name; as it is in the settings."""
        groups: dict[str, list[str]] = {}
        for item in self.tasks:
            groups |= {item: [item]} if isinstance(item, str) else item
        return groups

    def cells(self) -> Iterator[tuple[str, float, dict[str, Any]]]:
        """Variant, rate and ``mm_processor_kwargs`` of what each task is asked with; rate 0 first and once."""
        yield "", 0.0, {"evs_rate": 0.0}
        for variant, options in self.variants.items():
            for rate in self.rates[1:]:
                yield variant, rate, {"evs_rate": rate, **options}


def load_settings(path: Path, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Reads a file; `overrides` that are not None win.

    Raises:
        EVSError: a key is unknown, or a value not allowed.
    """
    content = yaml.safe_load(path.read_text()) or {}
    if unknown := set(content) - {item.name for item in fields(Settings)}:
        known = ", ".join(item.name for item in fields(Settings))
        raise EVSError(f"{path}: unknown keys {sorted(unknown)}; known: {known}")
    content |= {key: value for key, value in (overrides or {}).items() if value is not None}
    try:
        return Settings(**content)
    except (TypeError, ValueError, AttributeError) as error:
        raise EVSError(f"{path}: {error}") from None


# ---------------------------------------------------------------- asking


def measure(
    settings: Settings,
    tasks: "Tasks",
    client: "Client",
    groups: Mapping[str, Sequence[str]],
    done: Sequence[Point] = (),
) -> Iterator[Point]:
    """Each task at each rate, but for those that are `done`. A failure costs the others nothing, save one at rate 0."""
    have = {point.key: point for point in done if point.error is None}
    for task in dict.fromkeys(task for parts in groups.values() for task in parts):
        baseline: Point | None = None
        for variant, rate, options in settings.cells():
            if (point := have.get((task, variant, rate))) is None:
                if baseline is not None and baseline.error is not None:
                    continue
                point = ask(settings, tasks, client, task, variant, rate, options, baseline)
                yield point
            baseline = baseline or point


def ask(
    settings: Settings,
    tasks: "Tasks",
    client: "Client",
    task: str,
    variant: str,
    rate: float,
    options: Mapping[str, Any],
    baseline: Point | None,
) -> Point:
    """One task at one rate; `baseline` is the same at rate 0."""
    started, before = time.monotonic(), client.counters()
    try:
        scored = tasks.run(task, client, options, settings.limit, settings.max_tokens)
    except EVSError as error:
        return Point(task, variant, rate, error=str(error), seconds=time.monotonic() - started)
    point = Point(
        task, variant, rate, metrics=scored.metrics, questions=len(scored.answers), videos=scored.videos,
        prompt_tokens=[answer.prompt_tokens for answer in scored.answers],
        output_tokens=statistics.mean(answer.output_tokens for answer in scored.answers),
        answers=[answer.text for answer in scored.answers], seconds=time.monotonic() - started,
    )  # fmt: skip
    if rate:
        point.video_tokens, point.video_tokens_kept = counted(before, client.counters(), scored)
    point.error = failure(point, baseline)
    return point


def counted(
    before: Mapping[str, float] | None, after: Mapping[str, float] | None, scored: "Scored"
) -> tuple[int | None, int | None]:
    """The videos' tokens before and after, from the server's counters; None where these are not of our videos alone."""
    if before is None or after is None:
        return None, None
    clips, tokens, kept = (round(after[name] - before[name]) for name in before)
    return (tokens, kept) if clips == scored.videos > 0 else (None, None)


def failure(point: Point, baseline: Point | None) -> str | None:
    """Why a point's figures must not be shown, or None."""
    if baseline is None:
        return None
    if point.questions != baseline.questions:
        return f"{point.questions} questions, and {baseline.questions} at rate 0"
    if any(now > full for now, full in zip(point.prompt_tokens, baseline.prompt_tokens)):
        return "a prompt is longer than at rate 0: these are not the same questions, or not the same server"
    if sum(point.prompt_tokens) == sum(baseline.prompt_tokens):
        return f"the prompts are as long as at rate 0: the server pruned nothing at rate {point.rate:g}"
    if point.video_tokens is not None and point.video_tokens_kept is not None:
        dropped = sum(baseline.prompt_tokens) - sum(point.prompt_tokens)
        if dropped != point.video_tokens - point.video_tokens_kept:
            return f"prompts are {dropped} tokens shorter, /metrics says {point.video_tokens - point.video_tokens_kept}"
    return None


# ---------------------------------------------------------------- the command


def main() -> int:
    """Parses the command line, evaluates, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path, help="a file of configs/eval")
    parser.add_argument("--tasks", nargs="+", help="instead of those of the file")
    parser.add_argument("--rates", type=float, nargs="+", help="instead of those of the file; 0 is always asked, too")
    parser.add_argument("--limit", type=int, help="only so many questions of each task")
    parser.add_argument("--concurrency", type=int, help="requests in flight")
    parser.add_argument("--url", help="of the server (default: http://127.0.0.1:8000)")
    parser.add_argument("--model", help="the name that the server serves, where it serves several")
    parser.add_argument("--video-as", choices=("data", "file"), help="send video files, or their paths")
    parser.add_argument("--out", type=Path, help="name of the result without suffix; printed only by default")
    parser.add_argument("--resume", action="store_true", help="keep what is in the result file of the same settings")
    args = parser.parse_args()
    given = vars(args)
    overrides = {name: given[name] for name in ("tasks", "rates", "limit", "concurrency", "url", "model", "video_as")}
    try:
        return run(load_settings(args.settings, overrides), args)
    except (EVSError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def run(settings: Settings, args: argparse.Namespace) -> int:
    """Evaluates what the settings ask for; the files are written after every step."""
    client_module, lmms = bridge()
    client = client_module.Client(
        settings.url, settings.model, concurrency=settings.concurrency, video_as=settings.video_as, body=settings.body,
        timeout_s=settings.timeout_s,
    )  # fmt: skip
    if client.counters() is None:
        print(f"{client.root} shows no /metrics: tokens of prompts only", file=sys.stderr)
    folders = [args.settings.parent / folder for folder in settings.task_folders]
    wanted = [part for parts in settings.groups.values() for part in parts]
    tasks = lmms.Tasks(wanted, folders, settings.prompts)
    groups = {name: [p for part in parts for p in tasks.parts(part)] for name, parts in settings.groups.items()}
    content: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "evaluate",
        # Where the server is changes nothing.
        "settings": {name: value for name, value in asdict(settings).items() if name not in ("url", "concurrency")},
        "groups": groups,
        "environment": harness.environment(),
        "server": {
            "model": Path(client.model).name,
            "vllm": client.server_version(),
            "lmms_eval": importlib.metadata.version("lmms-eval"),
        },
        "complete": False,
    }
    points = kept_points(args.out, content) if args.resume else []
    content["points"] = [asdict(point) for point in points]
    for point in measure(settings, tasks, client, groups, points):
        content["points"] = [p for p in content["points"] if Point(**p).key != point.key] + [asdict(point)]
        write(content, args.out)
        said = f"no figure: {point.error}" if point.error else brief(point)
        print(f"{point.task:24} {point.variant:10} {point.rate:<5g} {said}", flush=True)
    content["complete"] = all(point["error"] is None for point in content["points"])
    write(content, args.out)
    if args.out is not None:
        plot(content, args.out.with_suffix(".svg"))
    print("\n" + markdown(content))
    return 0 if content["complete"] else 1


def bridge() -> tuple[Any, Any]:
    """The modules `client` and `lmms`, imported only now: they need more than this script.

    Raises:
        EVSError: something is not installed.
    """
    try:
        from bench.evaluate import client, lmms
    except ImportError as error:
        raise EVSError(f"{error}. {INSTALL}") from error
    return client, lmms


def kept_points(out: Path | None, content: Mapping[str, Any]) -> list[Point]:
    """What an earlier run found.

    Raises:
        EVSError: there is no such file, or its settings are others.
    """
    if out is None:
        raise EVSError("--resume needs --out")
    path = out.with_suffix(".json")
    if not path.exists():
        return []
    earlier = json.loads(path.read_text())
    for key in ("schema", "settings", "groups", "server"):
        # through JSON, as the file was
        if earlier.get(key) != json.loads(json.dumps(content[key])):
            raise EVSError(f"{path} has another {key!r}: leave --resume out, or take another --out")
    return [Point(**point) for point in earlier["points"] if point["error"] is None]


def write(content: Mapping[str, Any], out: Path | None) -> None:
    """Writes the JSON file and the table."""
    if out is not None:
        harness.write(dict(content), out.with_suffix(".json"))
        out.with_suffix(".md").write_text(markdown(content))


if __name__ == "__main__":
    sys.exit(main())
