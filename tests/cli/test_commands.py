# SPDX-License-Identifier: Apache-2.0
"""The command line as such: options from the table, errors in one line, `families`, what is imported when."""

import json
import subprocess
import sys

import pytest

from evs_vllm import __version__
from evs_vllm.cli import main, make_parser
from evs_vllm.cli._options import CLIP_OPTIONS, evs_config
from evs_vllm.families import FAMILIES
from evs_vllm.families.refused import REFUSED
from evs_vllm.options import OPTIONS

CLIP = ["clip.mp4", "--model", "tiny"]


def fails(capsys, *words):
    """The one line of a command that fails with code 2."""
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and out == "" and err.count("\n") == 1, (code, out, err)
    return err


def parsed(*words):
    return evs_config(make_parser().parse_args(["plan", *CLIP, *words]))


def test_each_option_of_the_table_is_there_once(capsys):
    for command in ("plan", "view", "live", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown = capsys.readouterr().out
        for option in OPTIONS:
            flag = "--" + option.name.replace("_", "-")
            assert (f"{flag} " in shown) == option.per_request
            assert option.flag not in shown
    assert [o.name for o in CLIP_OPTIONS] == [o.name for o in OPTIONS if o.per_request]


def test_settings_and_their_default():
    assert parsed().rate == 0.75
    assert parsed("--threshold", "4").to_mapping() == parsed().to_mapping() | {"rate": None, "threshold": 4}
    assert parsed("--max-tokens", "7").rate is None
    assert parsed("--rate", "0").rate == 0
    assert parsed("--positions", "sequential", "--min-tokens-per-unit", "2").min_tokens_per_unit == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "COMMAND"),
        (["paint"], "paint"),
        (["plan", *CLIP], "no such video file: clip.mp4"),
        (["plan", *CLIP, "--rate", "1"], "--rate: got 1; allowed: a number from 0"),
        (["plan", *CLIP, "--rate", "much"], "got 'much'"),
        (["plan", *CLIP, "--positions", "lost"], "keep or sequential"),
        (["plan", *CLIP, "--rate", "0.5", "--threshold", "3"], "contradict"),
        (["plan", *CLIP, "--fps", "-1"], "--fps"),
        (["plan", "clip.mp4"], "--model"),
        (["view", *CLIP, "-o", "out.gif"], ".png or .html"),
        (["view", *CLIP, "-o", "/no/where/out.png"], "no folder /no/where"),
        (["view", *CLIP, "-o", "out.html", "--budget", "causal"], "--output out.png"),
        (["demo", "--rate", "0"], "drop nothing"),
        (["demo", "--repeats", "-1"], "at least 0"),
        (["demo", "--video", "clip.mp4"], "no such video file: clip.mp4"),
    ],
)
def test_errors_are_one_line(capsys, words, expected):
    assert expected in fails(capsys, *words)


def test_a_folder_that_is_no_model(capsys, tmp_path):
    (video := tmp_path / "clip.mp4").touch()
    assert "no model folder" in fails(capsys, "plan", str(video), "--model", str(tmp_path))
    assert "no model folder" in fails(capsys, "plan", str(video), "--model", "/no/such/folder")


def test_families(capsys):
    assert main(["families"]) == 0
    lines = capsys.readouterr().out.splitlines()
    starts = [line.split("  ")[0] for line in lines if line]
    assert starts == ["family", *(family.name for family in FAMILIES), "refused", *(row.name for row in REFUSED)]
    assert main(["families", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["architectures"] for row in rows] == [list(row.architectures) for row in (*FAMILIES, *REFUSED)]
    assert [row["supported"] for row in rows] == [True] * len(FAMILIES) + [False] * len(REFUSED)


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"evs-vllm {__version__}\n"


@pytest.mark.parametrize(
    "words", [["doctor"], ["families"], ["plan", *CLIP], ["live", "0", "--server", "x", "--fps", "1", "--chunk", "1"]]
)
def test_what_needs_no_torch_does_not_import_it(words):
    code = (
        "import sys; from evs_vllm.cli import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'vllm', 'numpy', 'triton', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True, timeout=60)


def test_output_into_a_closed_pipe_is_no_error():
    command = f"'{sys.executable}' -c 'import sys; from evs_vllm.cli import main; sys.exit(main())' families"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | true"], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
