# SPDX-License-Identifier: Apache-2.0
"""What is checked and set up when an engine with EVS starts: what cannot work is refused with the reason."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evs_vllm.errors import ConfigError, RequestError, UnsupportedError
from evs_vllm.families import FAMILIES, supported_architectures
from evs_vllm.families.refused import REFUSED, Refused

pytestmark = [pytest.mark.vllm, pytest.mark.usefixtures("registered")]


def text_model(directory: Path, vocab_size: int = 128) -> Path:
    from transformers import Qwen2Config

    Qwen2Config(
        architectures=["Qwen2ForCausalLM"], hidden_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=64, vocab_size=vocab_size,
    ).save_pretrained(directory)  # fmt: skip
    return directory


def model_config(model: Path, evs: Any, **kwargs: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    kwargs.setdefault("skip_tokenizer_init", False)
    return EngineArgs(model=str(model), additional_config={"evs": evs}, **kwargs).create_model_config()


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.name)
def test_refused_families_are_named_with_the_reason(row: Refused) -> None:
    from vllm import ModelRegistry

    from evs_vllm.engine.plugin import _start

    assert not set(row.architectures) & set(supported_architectures())
    assert set(row.architectures) <= set(ModelRegistry.get_supported_archs())
    asked = SimpleNamespace(additional_config={"evs": {"rate": 0.5}})
    for architecture in row.architectures:
        model_config = SimpleNamespace(architecture=architecture, model="here", multimodal_config=object())
        with pytest.raises(UnsupportedError) as error:
            _start(asked, model_config)
        assert (
            f"does not support {architecture} (here) {'yet' if row.fits else 'and cannot'}: {row.reason}. Supp"
            in str(error.value)
        )


def test_start_is_refused_where_evs_cannot_work(
    tmp_path: Path, qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evs_vllm.engine import attached, compat

    with pytest.raises(UnsupportedError, match=r"does not support Qwen2ForCausalLM.*Qwen2_5_VL.*Drop the --evs"):
        model_config(text_model(tmp_path), {"rate": 0.5})
    with pytest.raises(UnsupportedError, match=r"--video-pruning-rate 0\.5 and the --evs"):
        model_config(qwen2_5_vl, {"rate": 0.5}, video_pruning_rate=0.5)
    with pytest.raises(UnsupportedError, match=r"--enable-tower-connector-lora and EVS.*another request's adapter"):
        model_config(qwen2_5_vl, {"rate": 0.5}, enable_lora=True, enable_tower_connector_lora=True)
    assert model_config(qwen2_5_vl, {"rate": 0.5}, enable_lora=True) is not None
    with pytest.raises(UnsupportedError, match="evs_rate, which are keys for requests"):
        model_config(qwen2_5_vl, {"rate": 0.5}, mm_processor_kwargs={"evs_rate": 0.5})
    with pytest.raises(ConfigError, match="allowed"):
        model_config(qwen2_5_vl, {"rate": 2})
    with pytest.raises(ConfigError, match="mapping"):
        model_config(qwen2_5_vl, 0.75)
    with monkeypatch.context() as patch:
        patch.delenv("EVS_ALLOW_UNTESTED_VLLM", raising=False)  # `make next` sets it
        patch.setattr(compat.vllm, "__version__", "0.99.1")
        with pytest.raises(UnsupportedError, match=r"0\.99\.1.*EVS_ALLOW_UNTESTED_VLLM=1"):
            model_config(qwen2_5_vl, {"rate": 0.5})
        patch.setenv("EVS_ALLOW_UNTESTED_VLLM", "1")
        assert attached.settings_of(model_config(qwen2_5_vl, {"rate": 0.5})).rate == 0.5
    with monkeypatch.context() as patch:
        patch.setattr(compat.vllm.envs, "VLLM_USE_RUST_FRONTEND", True, raising=False)
        with pytest.raises(UnsupportedError, match="Rust frontend"):
            model_config(qwen2_5_vl, {"rate": 0.5}, mm_device_do_normalize=False)


def test_stamp_survives_what_vllm_does_to_configs(qwen2_5_vl: Path) -> None:
    import copy
    import pickle

    from evs_vllm.engine.attached import settings_of

    config = model_config(qwen2_5_vl, {"rate": 0.5})
    for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert settings_of(other).rate == 0.5


def test_off_means_stock_processor_and_stock_class(qwen2_5_vl: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLMultiModalProcessor
    from vllm.multimodal import MULTIMODAL_REGISTRY

    from evs_vllm.engine import model

    off = EngineArgs(model=str(qwen2_5_vl)).create_model_config()
    processor = MULTIMODAL_REGISTRY.create_processor(off)
    assert type(processor) is Qwen2_5_VLMultiModalProcessor
    with pytest.raises(RequestError, match="EVS is off here"):
        processor("text", processor.info.parse_mm_data({}), hf_processor_mm_kwargs={"evs_rate": 0.5})
    assert processor("text", processor.info.parse_mm_data({}))["prompt_token_ids"]

    class Stock:
        _processor_factory = MULTIMODAL_REGISTRY._get_model_cls(off)._processor_factory

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            self.prefix = prefix
            self.visual = SimpleNamespace(blocks=[])

        def embed_multimodal(self, **kwargs: Any) -> Any:
            return kwargs

        def named_children(self) -> tuple[()]:
            return ()

    cls = model.model_class(Stock, FAMILIES[0])
    scheduler = SimpleNamespace(max_num_encoder_input_tokens=1)
    built = cls(vllm_config=SimpleNamespace(additional_config={}, model_config=off), prefix="p")
    assert type(built) is Stock and built.prefix == "p"
    assert built.embed_multimodal(pixels=1) == {"pixels": 1}
    with pytest.raises(UnsupportedError, match=r"without EVS.*same --evs-\* options"):
        built.embed_multimodal(pixels=1, evs_plan=[])
    on = model_config(qwen2_5_vl, {"rate": 0.5})
    extra = {"evs": {"rate": 0.5}}
    config = SimpleNamespace(additional_config=extra, model_config=on, scheduler_config=scheduler)
    assert type(cls(vllm_config=config)) is cls
    with pytest.raises(UnsupportedError, match="did not reach the model config"):
        cls(vllm_config=SimpleNamespace(additional_config=extra, model_config=off, scheduler_config=scheduler))


def test_a_worker_of_another_installation_does_not_start(qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint of who read the options travels with the model config; here it meets other weights and torch."""
    import pickle

    from vllm import ModelRegistry

    from evs_vllm import fingerprint
    from evs_vllm.engine import model
    from evs_vllm.engine.attached import fingerprint_of

    config = pickle.loads(pickle.dumps(model_config(qwen2_5_vl, {"rate": 0.5, "stream_cache_gb": 1})))
    assert fingerprint_of(config)["rate"] == "1/2"
    model._check_fingerprint(config)
    others = {**fingerprint.installed_parts(), "weights": "0123456789ab", "torch": "1.13"}
    monkeypatch.setattr(fingerprint, "installed_parts", lambda: others)
    cls = ModelRegistry.models["Qwen2_5_VLForConditionalGeneration"].load_model_cls()
    on = SimpleNamespace(additional_config={"evs": {"rate": 0.5}}, model_config=config)
    with pytest.raises(UnsupportedError) as error:
        cls(vllm_config=on)
    text = str(error.value)
    assert "weights is '0123456789ab' here and '" in text and "torch is '1.13' here and '" in text
    assert "version" not in text.split("Clips")[0] and "Install the same" in text


def test_the_fingerprint_is_a_metric(qwen2_5_vl: Path) -> None:
    from prometheus_client import REGISTRY, generate_latest
    from vllm.engine.arg_utils import EngineArgs

    from evs_vllm.engine.attached import fingerprint_of
    from evs_vllm.fingerprint import METRIC
    from evs_vllm.serving import parse_info

    for rate in (0.5, 0.25, 0.5):
        parts = fingerprint_of(model_config(qwen2_5_vl, {"rate": rate}))
        assert parse_info(generate_latest(REGISTRY).decode(), METRIC) == [parts], "one engine at a time"
    assert fingerprint_of(EngineArgs(model=str(qwen2_5_vl)).create_model_config()) is None


def test_reuse_needs_the_stock_attention_path(qwen2_5_vl: Path) -> None:
    from evs_vllm.engine.attached import settings_of

    assert settings_of(model_config(qwen2_5_vl, {"rate": 0.5})).encoder == "reuse"
    for obstacle in ({"mm_encoder_tp_mode": "data"}, {"compilation_config": {"compile_mm_encoder": True}}):
        config = settings_of(model_config(qwen2_5_vl, {"rate": 0.5}, **obstacle))
        assert config.encoder == "full" and config.why_not_reuse
        with pytest.raises(ConfigError, match="not possible here"):
            model_config(qwen2_5_vl, {"rate": 0.5, "encoder": "reuse"}, **obstacle)


@pytest.mark.parametrize("kind", ["ec", "kv"])
@pytest.mark.parametrize("role", ["consumer", "producer", "both"])
def test_parts_of_a_disaggregated_deployment_start(qwen2_5_vl: Path, kind: str, role: str) -> None:
    """What a consumer is sent without pixels is judged request by request (tests/families/test_handover.py)."""
    from vllm.engine.arg_utils import EngineArgs

    config = {f"{kind}_connector": f"{'EC' if kind == 'ec' else ''}ExampleConnector", f"{kind}_role": f"{kind}_{role}"}
    arguments = EngineArgs(
        model=str(qwen2_5_vl), additional_config={"evs": {"rate": 0.5}}, **{f"{kind}_transfer_config": config}
    )
    engine = arguments.create_engine_config()
    mm_config = engine.model_config.multimodal_config
    assert mm_config.allow_missing_mm_embeddings == (role != "producer")


def test_drafts_of_the_first_runner_get_no_kept_positions(tmp_path: Path, qwen2_5_vl: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from evs_vllm.engine.attached import why_keep_is_forbidden
    from evs_vllm.engine.limits import check_positions

    size = EngineArgs(model=str(qwen2_5_vl)).create_model_config().get_vocab_size()
    draft = {"method": "draft_model", "model": str(text_model(tmp_path, size)), "num_speculative_tokens": 2}
    ngram = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}

    def start(speculative: Any, **evs: Any) -> Any:
        args = EngineArgs(model=str(qwen2_5_vl), speculative_config=speculative, additional_config={"evs": evs})
        return args.create_engine_config().model_config

    with pytest.raises(UnsupportedError, match=r"keep is not possible here.*'draft_model'.*--evs-positions sequential"):
        start(draft, rate=0.5)
    config = start(draft, rate=0.5, positions="sequential")
    assert why_keep_is_forbidden(config) and not why_keep_is_forbidden(start(ngram, rate=0.5))
    check_positions(None, config, 5, [SimpleNamespace(positions="sequential")])  # type: ignore[arg-type, list-item]
    with pytest.raises(RequestError, match="'keep' is not possible here.*'sequential'"):
        check_positions(None, config, 5, [SimpleNamespace(positions="keep")])  # type: ignore[arg-type, list-item]


def test_kernels_are_compiled_where_clips_arrive(qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import ECTransferConfig

    from evs_vllm.engine import allowed, plugin

    def on_gpu(**kwargs: Any) -> bool:
        asked: list[bool] = []
        with monkeypatch.context() as patch:
            patch.setattr(plugin, "_compile_kernels", lambda on_gpu: asked.append(on_gpu))
            model_config(qwen2_5_vl, {"rate": 0.5}, **kwargs)
        (answer,) = asked
        return answer

    producer = {"ec_transfer_config": ECTransferConfig(ec_connector="Some", ec_role="ec_producer")}
    shared: dict[str, Any] = {"mm_tensor_ipc": "torch_shm"}
    cuda, host = ({"mm_processor_kwargs": {"device": device}} for device in ("cuda:1", "cpu"))
    decoded = {"media_io_kwargs": {"video": {"device": "cuda:0"}}}
    everything = (producer, cuda, decoded)
    for options in everything:
        assert not on_gpu(**shared, **options)
    monkeypatch.setattr(allowed, "current_platform", SimpleNamespace(device_type="cuda"))
    assert not on_gpu() and not on_gpu(**shared) and not on_gpu(**producer)
    assert on_gpu(**shared, **producer) and on_gpu(**cuda) and on_gpu(**decoded)
    assert not any(on_gpu(**shared, **options, **host) for options in (producer, decoded))


def test_long_rotary_cache_with_evs_only(model_dir: Callable[[str], Path]) -> None:
    """Of the models that make it no longer than the context, in each module that asks for its length."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe

    from evs_vllm.engine import compat

    compat.widen_rotary_caches()
    compat.widen_rotary_caches()
    on = model_config(model_dir("qwen3_vl"), {"rate": 0.5})
    off = EngineArgs(model=str(model_dir("qwen3_vl"))).create_model_config()
    text = SimpleNamespace(multimodal_config=None)
    for module in (qwen3_vl, qwen3_vl_moe, qwen3_5):

        def factor(model: Any, target: Any = None, ask: Any = module.mrope_positions_factor) -> int:
            speculative = None if target is None else SimpleNamespace(target_model_config=target)
            return int(ask(SimpleNamespace(model_config=model, speculative_config=speculative)))

        assert factor(on) == compat.MROPE_CACHE_FACTOR and factor(off) == 1
        assert factor(text, target=on) == compat.MROPE_CACHE_FACTOR and factor(text, target=off) == 1, "a drafter"


@pytest.mark.parametrize("why", ["", "it makes other pixels than a CPU"])
def test_a_gpu_is_tried_at_start_up(
    why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import torch

    import evs_kernels
    from evs_vllm.engine import plugin
    from evs_vllm.families import front_end

    warmed: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(evs_kernels, "warmup", lambda device="cpu": warmed.append(torch.device(device)))
    monkeypatch.setattr(front_end, "why_not_on", lambda device: why)
    with caplog.at_level("INFO", "vllm.evs_vllm"):
        plugin._compile_kernels(on_gpu=True)
    assert warmed == [torch.device("cpu"), torch.device("cuda", 1)]
    assert f"pixels of clips on cuda:1 are made {'by the processor: it makes' if why else 'there.'}" in caplog.text
