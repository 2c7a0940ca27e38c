# SPDX-License-Identifier: Apache-2.0
"""Registration: idempotent, silent when not asked for, loud when asked for and impossible."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evs_vllm import versions
from evs_vllm.errors import ConfigError, RequestError
from evs_vllm.families import FAMILIES, supported_architectures
from tests.engine.test_start import model_config

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("registered")]


def parse(words: list[str]) -> Any:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)


def test_twice_is_once() -> None:
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs

    from evs_vllm.engine import compat

    for name in ("add_cli_args", "from_cli_args", "create_model_config", "create_engine_config"):
        function = getattr(EngineArgs, name)
        assert not hasattr(function.__wrapped__, "__wrapped__"), name
    for architecture in supported_architectures():
        assert ModelRegistry.models[architecture].module_name == "evs_vllm.engine.model"
        assert compat.stock_model_class(architecture).__module__.startswith("vllm.")


@pytest.mark.parametrize("architecture", supported_architectures())
def test_registered_class_looks_like_the_stock_one(architecture: str) -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.registry import _ModelInfo

    from evs_vllm.engine import compat

    stock = compat.stock_model_class(architecture)
    ours = ModelRegistry.models[architecture].load_model_cls()
    assert issubclass(ours, stock) and ours is not stock and ours.__name__ == stock.__name__
    assert _ModelInfo.from_model_cls(ours) == _ModelInfo.from_model_cls(stock)


def test_every_process_registers() -> None:
    """A fresh process loads the entry point by itself, as vLLM's engine and workers do."""
    code = (
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "from vllm import ModelRegistry; import json;"
        f"print(json.dumps([ModelRegistry.models[a].module_name for a in {list(supported_architectures())}]))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    names = json.loads(run.stdout.strip().splitlines()[-1])
    assert names == ["evs_vllm.engine.model"] * len(supported_architectures())


def test_families_are_consistent() -> None:
    assert len(set(supported_architectures())) == len(supported_architectures())
    for family in FAMILIES:
        assert family.bind(None) is not None


def test_flags_reach_additional_config(tmp_path: Path, qwen2_5_vl: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    model = str(qwen2_5_vl)
    args = parse(["--model", model, "--evs-rate", "0.75", "--evs-positions=sequential", "--evs-max-tokens", "100"])
    assert EngineArgs.from_cli_args(args).additional_config["evs"] == {
        "rate": 0.75, "positions": "sequential", "max_tokens": 100
    }  # fmt: skip
    assert args.additional_config["evs"]["rate"] == 0.75, "further API servers get the namespace"

    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {model}\nevs-rate: 0.5\nevs-request-overrides: any\n")
    args = parse(["--config", str(file)])
    assert EngineArgs.from_cli_args(args).additional_config["evs"] == {"rate": 0.5, "request_overrides": "any"}

    args = parse(["--model", model, "--additional-config", '{"a": 1, "evs": {"rate": 0.5}}', "--evs-max-tokens", "9"])
    assert EngineArgs.from_cli_args(args).additional_config == {"a": 1, "evs": {"rate": 0.5, "max_tokens": 9}}

    assert EngineArgs.from_cli_args(parse(["--model", model])).additional_config == {}

    for line, expected in (("true", True), ("'false'", False)):  # of false itself vLLM makes no word
        file.write_text(f"model: {model}\nevs-stream: {line}\nevs-rate: 0.5\n")
        args = parse(["--config", str(file)])
        assert EngineArgs.from_cli_args(args).additional_config["evs"] == {"rate": 0.5, "stream": expected}
    for words, expected in ((["--evs-stream"], True), (["--evs-stream", "false"], False)):
        args = parse(["--model", model, *words])
        assert EngineArgs.from_cli_args(args).additional_config["evs"] == {"stream": expected}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--evs-rate", "1"], "--evs-rate: got 1; allowed: a number from 0"),
        (["--evs-rate", "most"], "--evs-rate: got 'most'"),
        (["--evs-positions", "kept"], "keep or sequential"),
        (["--evs-threshold", "300"], "255"),
    ],
)
def test_bad_flags_end_the_command(words: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(["--model", "m", *words])
    assert end.value.code == 2
    assert text in " ".join(capsys.readouterr().err.split())


def test_contradiction_ends_the_start() -> None:
    from vllm.engine.arg_utils import EngineArgs

    with pytest.raises(ConfigError, match="contradict"):
        EngineArgs.from_cli_args(parse(["--model", "m", "--evs-rate", "0.5", "--evs-threshold", "6"]))


def test_request_check(qwen2_5_vl: Path) -> None:
    from vllm.entrypoints.generate.base import protocol
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import online_renderer

    check = online_renderer.validate_request_mm_kwargs

    def request(kwargs: dict[str, Any] | None, trust: bool = False) -> None:
        check(mm_processor_kwargs=kwargs, media_io_kwargs=None, trust_request_mm_kwargs=trust)

    model_config(qwen2_5_vl, {"rate": 0.5})
    assert check is protocol.validate_request_mm_kwargs
    request({"evs_rate": 0.9})
    request(None)
    with pytest.raises(RequestError, match="cost more"):
        request({"evs_rate": 0.1}, trust=True)
    with pytest.raises(VLLMValidationError, match="trust-request-mm-kwargs"):
        request({"evs_rate": 0.9, "fps": 1})
    request({"evs_rate": 0.9, "fps": 1}, trust=True)

    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(model=str(qwen2_5_vl)).create_model_config()
    with pytest.raises(RequestError, match="EVS is off here"):
        request({"evs_rate": 0.9}, trust=True)
    request({"fps": 1}, trust=True)


def test_tested_versions() -> None:
    assert versions.version_is_tested("0.32.0+cpu") and versions.version_is_tested("0.33.1")
    assert not versions.version_is_tested("0.3.2") and not versions.version_is_tested("dev")
    assert "0.32.x" in versions.tested_range()


def test_namespace_without_our_flags_is_left_alone() -> None:
    from evs_vllm.engine.plugin import _read_cli_options

    args = argparse.Namespace(additional_config=None)
    _read_cli_options(args)
    assert args.additional_config is None
