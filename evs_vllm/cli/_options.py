# SPDX-License-Identifier: Apache-2.0
"""Arguments that several subcommands share. The EVS options come from `evs_vllm.options.OPTIONS`."""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from evs_vllm.config import EVSConfig
from evs_vllm.errors import EVSError
from evs_vllm.options import OPTIONS

DEFAULT_RATE = 0.75
"""Used where neither a rate, a threshold nor a cap is given."""

# Which requests may override what means nothing for one clip.
CLIP_OPTIONS = tuple(option for option in OPTIONS if option.per_request)


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one line; its subparsers are too."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def add_evs_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--rate``, ``--threshold``...: the ``--evs-*`` options of ``vllm serve`` without their prefix."""
    group = parser.add_argument_group("EVS", f"As the --evs-* options of vllm serve; --rate {DEFAULT_RATE} by default.")
    for option in CLIP_OPTIONS:
        option.add_to(group, "--" + option.name.replace("_", "-"))


def evs_config(args: argparse.Namespace) -> EVSConfig:
    """The settings that `add_evs_options` parsed.

    Raises:
        ConfigError: They contradict each other.
    """
    given = {o.name: value for o in CLIP_OPTIONS if (value := getattr(args, o.request_key)) is not None}
    if not {"rate", "threshold", "max_tokens"} & set(given):
        given["rate"] = DEFAULT_RATE
    return EVSConfig.from_mapping(given)


def add_clip_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds VIDEO, --model and the frame options."""
    parser.add_argument("video", metavar="VIDEO", type=Path, help="Video file.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Model folder (or hub name), as for vllm serve.")
    add_frame_options(parser)


def add_frame_options(parser: argparse.ArgumentParser) -> None:
    """Adds what decides which frames the model sees."""
    group = parser.add_argument_group("frames", "As --media-io-kwargs '{\"video\": {...}}' of vllm serve.")
    group.add_argument(
        "--fps", type=positive(float), metavar="FPS", help="Frames per second, for loaders that sample by rate."
    )
    group.add_argument(
        "--num-frames",
        type=positive(int),
        metavar="N",
        help="Frames to sample, for loaders that sample by count (Qwen2-VL's does not).",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="As for vllm serve.")


def media_io_kwargs(args: argparse.Namespace) -> dict[str, Any]:
    """The video loader's settings that `add_frame_options` parsed."""
    given = {"fps": args.fps, "num_frames": args.num_frames}
    return {name: int(v) if v == int(v) else v for name, v in given.items() if v is not None}


def frame_words(args: argparse.Namespace) -> list[str]:
    """The words of ``vllm serve`` for what `add_frame_options` parsed."""
    given = media_io_kwargs(args)
    words = ["--media-io-kwargs", json.dumps({"video": given})] if given else []
    return words + ["--trust-remote-code"] * args.trust_remote_code


def summary(doc: str | None) -> str:
    """A module's docstring as the description of its command."""
    return (doc or "").replace("``", "")


def check_paths(video: Path, model: str) -> None:
    """Refuses what is not there before anything slow is imported.

    Raises:
        EVSError: No such video file or model folder.
    """
    if not video.is_file():
        raise EVSError(f"no such video file: {video}")
    check_model(model)


def check_model(model: str) -> None:
    """Refuses a model folder that is not there.

    Raises:
        EVSError: No such folder.
    """
    looks_like_path = model.startswith((".", "~", "/")) or model.count("/") > 1
    folder = Path(model).expanduser()
    if (looks_like_path or folder.exists()) and not (folder / "config.json").is_file():
        raise EVSError(f"no model folder (with a config.json): {model}")


def quiet_vllm() -> None:
    """To be called before vLLM's first import: it logs to stdout unless told otherwise."""
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


def positive(kind: type) -> Callable[[str], Any]:
    """The ``type`` of an argument that is a number above 0; `kind` is int or float."""

    def read(text: str) -> Any:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read
