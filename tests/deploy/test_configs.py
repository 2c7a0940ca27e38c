# SPDX-License-Identifier: Apache-2.0
"""What stands in configs/deploy: valid to those who read it, with options that vLLM and this package have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs/deploy"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()))
VALUES = yaml.safe_load((FOLDER / "production-stack.yaml").read_text())


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_manifests_follow_the_schema(manifest: dict[str, Any]) -> None:
    kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


def test_the_schema_is_looked_at() -> None:
    (deployment,) = (each for each in MANIFESTS if each["kind"] == "Deployment")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(
            {**deployment, "spec": {**deployment["spec"], "replica": 2}},
            kubernetes_validate.latest_version(),
            strict=True,
        )


def test_manifests_fit_together() -> None:
    by_kind = {each["kind"]: each for each in MANIFESTS}
    pod = by_kind["Deployment"]["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert by_kind["Service"]["spec"]["selector"].items() <= labels.items()
    assert by_kind["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
    assert volumes["settings"]["configMap"]["name"] == by_kind["ConfigMap"]["metadata"]["name"]
    assert (
        volumes["models"]["persistentVolumeClaim"]["claimName"] == by_kind["PersistentVolumeClaim"]["metadata"]["name"]
    )
    (container,) = pod["spec"]["containers"]
    assert {each["name"] for each in container["volumeMounts"]} == set(volumes)


def commands() -> dict[str, list[str]]:
    """The arguments of ``vllm serve`` in each file; what the chart passes by itself is left out."""
    found = {f"compose {name}": service["command"] for name, service in COMPOSE["services"].items()}
    (config,) = (each for each in MANIFESTS if each["kind"] == "ConfigMap")
    settings = yaml.safe_load(config["data"]["serve.yaml"])
    found["kubernetes"] = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    for spec in VALUES["servingEngineSpec"]["modelSpec"]:
        found[f"production stack {spec['name']}"] = [spec["modelURL"], *spec["vllmConfig"]["extraArgs"]]
    return found


@pytest.mark.vllm
@pytest.mark.parametrize("name", commands())
def test_arguments_are_those_of_vllm(name: str) -> None:
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from evs_vllm.engine.plugin import register

    register()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", *commands()[name]])
    assert args.evs_rate == 0.75
    if "consumer" in name or "encoder" in name:
        assert args.ec_transfer_config is not None


def test_all_processes_of_a_deployment_have_the_same_settings() -> None:
    for services in (["encoder", "consumer"],):
        given = [[word for word in COMPOSE["services"][name]["command"] if "evs" in word] for name in services]
        assert given[0] and all(each == given[0] for each in given)


def test_images_are_those_that_docker_builds() -> None:
    build = COMPOSE["x-engine"]["build"]
    assert (FOLDER / build["context"] / build["dockerfile"]).resolve() == ROOT / "docker/Dockerfile"
    image = COMPOSE["x-engine"]["image"]
    assert f"-t {image} " in (ROOT / "docker/Dockerfile").read_text()
    (spec,) = VALUES["servingEngineSpec"]["modelSpec"]
    (deployment,) = (each for each in MANIFESTS if each["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert spec["repository"] == container["image"].split(":")[0] == image
