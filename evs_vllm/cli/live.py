# SPDX-License-Identifier: Apache-2.0
"""``evs-vllm live``: a camera, a stream or a file as a chat with a vLLM server, a question every few seconds.

One line a turn: time in the stream, how much longer the prompt got, how much of the context is used, tokens that the
server had cached, time to first token, frames dropped because the server was slower than the source, the answer.
"""

import argparse
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evs_vllm.cli._options import CLIP_OPTIONS, check_model, evs_config, positive, quiet_vllm, summary
from evs_vllm.errors import EVSError

if TYPE_CHECKING:
    from evs_vllm.live.chat import Conversation

QUESTION = "What happens in the video right now? Answer in one sentence."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("live", help="ask a server about live video", description=summary(__doc__))
    parser.add_argument("source", metavar="SOURCE", help="Video file, number of a camera (0), or RTSP or HTTP URL.")
    parser.add_argument("--server", required=True, metavar="URL", help="Of vllm serve, as http://localhost:8000.")
    parser.add_argument("--question", default=QUESTION, metavar="TEXT", help="What to ask every turn.")
    parser.add_argument(
        "--every", type=positive(float), metavar="SECONDS", help="Video from question to question; as --chunk."
    )
    parser.add_argument(
        "--chunk", type=positive(float), default=4.0, metavar="SECONDS", help="Longest part of it sent as one (4)."
    )
    parser.add_argument("--fps", type=positive(float), default=2.0, metavar="FPS", help="Frames per second (2).")
    parser.add_argument("--fast", action="store_true", help="Play a file as fast as the server answers; drop nothing.")
    parser.add_argument(
        "--max-side", type=positive(int), metavar="PIXELS", help="Make frames with a longer side this small first."
    )
    parser.add_argument(
        "--keep-seconds",
        type=positive(float),
        metavar="SECONDS",
        help="Video in the conversation at most; beyond, the oldest turns are dropped until half is left. Without it "
        "the session ends when the context is full.",
    )
    parser.add_argument("--history", action="store_true", help="Keep earlier questions and answers in the prompt, too.")
    parser.add_argument("--answer-tokens", type=positive(int), default=64, metavar="N", help="Longest answer (64).")
    parser.add_argument("--served-model", metavar="NAME", help="The model's name there; by default the first listed.")
    parser.add_argument(
        "--api-key", default=os.environ.get("VLLM_API_KEY"), metavar="KEY", help="Of the server; $VLLM_API_KEY."
    )
    parser.add_argument(
        "--patience",
        type=positive(float),
        default=300.0,
        metavar="SECONDS",
        help="How long a lost source or server may stay away (300).",
    )
    parser.add_argument("--json", action="store_true", help="Print one JSON object a turn.")
    parser.add_argument(
        "--picture",
        type=Path,
        metavar="FILE",
        help="At the end, draw what was kept of the video that is then in the conversation, as out.png. Needs --model "
        "and vLLM on this machine: what a server keeps is worked out again.",
    )
    parser.add_argument("--model", metavar="DIR", help="Model folder, for --picture.")
    parser.add_argument("--trust-remote-code", action="store_true", help="As for vllm serve, for --picture.")
    group = parser.add_argument_group("EVS", "Sent with each request (evs_rate...); otherwise the server's setting.")
    for option in CLIP_OPTIONS:
        option.add_to(group, "--" + option.name.replace("_", "-"))
    group.add_argument(
        "--plain",
        action="store_true",
        help="Send no evs_* keys: for a server without EVS, and to compare.",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from evs_vllm.live.chat import Conversation
    from evs_vllm.live.chunks import Chunker
    from evs_vllm.live.client import Asking, Client
    from evs_vllm.live.report import Report
    from evs_vllm.live.session import watch
    from evs_vllm.live.source import Player, check_opencv, parse_source

    keys = request_keys(args)
    _check_picture(args)
    chunker = Chunker(args.fps, args.chunk, args.every)
    conversation = Conversation(args.question, args.history, args.keep_seconds)
    report = Report(args.json)
    check_opencv()
    source = parse_source(args.source)
    url = args.server if "://" in args.server else f"http://{args.server}"
    asking = Asking(
        url=url.rstrip("/").removesuffix("/v1"),
        model=args.served_model,
        fps=args.fps,
        answer_tokens=args.answer_tokens,
        keys=keys,
        api_key=args.api_key,
        patience_s=args.patience,
    )
    client = Client(asking, report.notice)
    client.connect()
    stop = threading.Event()
    player = Player(source, args.fps, stop, report.notice, args.patience, args.fast, args.max_side)
    lengths = "+".join(str(b - a) for a, b in zip(chunker.bounds, chunker.bounds[1:]))
    report.begin(
        f"{source.name} to {client.model} at {asking.url}: a question every {chunker.turn_frames / args.fps:g} s, "
        f"{lengths} frames at {args.fps:g} a second"
    )
    try:
        watch(lambda: chunker.turns(player), stop, client, conversation, report, waits=args.fast)
    finally:
        if args.picture is not None and conversation.chunks:
            report.notice(_draw(args, source.name, conversation, keys))
    return 0


def request_keys(args: argparse.Namespace) -> dict[str, Any]:
    """The ``evs_*`` keys that go with each request.

    Raises:
        EVSError: There are some beside ``--plain``.
    """
    given = {o.request_key: value for o in CLIP_OPTIONS if (value := getattr(args, o.request_key)) is not None}
    if not args.plain:
        return {"evs_stream": True} | given
    if given:
        raise EVSError(f"--plain sends no evs_* keys, got {', '.join(given)} beside it.")
    return {}


def _check_picture(args: argparse.Namespace) -> None:
    """Refuses a picture that could not be drawn, before the session."""
    if args.picture is None:
        return
    if args.model is None:
        raise EVSError(
            "--picture needs --model: which tokens a server kept it does not tell, so they are worked out here again."
        )
    if args.plain:
        raise EVSError("--picture shows what EVS keeps of a stream, and --plain asks for none; leave one of them out.")
    if args.picture.suffix.lower() != ".png":
        raise EVSError(f"--picture got {args.picture}; allowed: a name that ends in .png.")
    if not args.picture.absolute().parent.is_dir():
        raise EVSError(f"--picture got {args.picture}, but there is no folder {args.picture.absolute().parent}.")
    check_model(args.model)


def _draw(args: argparse.Namespace, name: str, conversation: "Conversation", keys: dict[str, Any]) -> str:
    """Draws the conversation's video, and returns a line that says so, or why not."""
    quiet_vllm()
    from evs_vllm.cli.view import write_view
    from evs_vllm.engine.inspect import inspect_stream

    chunks = [(chunk.url, chunk.start) for chunk in conversation.chunks]
    model = os.path.expanduser(args.model)
    try:
        clip = inspect_stream(chunks, args.fps, model, evs_config(args), keys, name, args.trust_remote_code)
        return write_view(clip, args.picture)
    except EVSError as error:
        return f"no picture: {error}"
