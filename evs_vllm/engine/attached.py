# SPDX-License-Identifier: Apache-2.0
"""What we attach to vLLM's ``ModelConfig``, by which every process of an engine knows our settings."""

from typing import Any

_SETTINGS = "_evs_config"
_FINGERPRINT = "_evs_fingerprint"
_WHY_NOT_KEEP = "_evs_why_not_keep"


def attach_settings(model_config: Any, config: object, fingerprint: dict[str, str]) -> None:
    """Attaches our settings to a ``ModelConfig``, and the fingerprint of the process that checked them.

    Both survive copying and pickling, and are part of no vLLM hash.
    """
    for target in (model_config, model_config.multimodal_config):
        object.__setattr__(target, _SETTINGS, config)
        object.__setattr__(target, _FINGERPRINT, fingerprint)


def settings_of(model_config: Any) -> Any | None:
    """The settings that `attach_settings` attached, if any."""
    return _attached(model_config, _SETTINGS)


def fingerprint_of(model_config: Any) -> dict[str, str] | None:
    """The fingerprint that `attach_settings` attached, if any."""
    return _attached(model_config, _FINGERPRINT)


def _attached(model_config: Any, name: str) -> Any | None:
    for target in (model_config, getattr(model_config, "multimodal_config", None)):
        if (value := getattr(target, name, None)) is not None:
            return value
    return None


def forbid_keep(model_config: Any, why: str) -> None:
    """Notes on a ``ModelConfig`` why no request may ask for kept positions; `why_keep_is_forbidden` finds it."""
    object.__setattr__(model_config, _WHY_NOT_KEEP, why)


def why_keep_is_forbidden(model_config: Any) -> str:
    """What `forbid_keep` noted, or ""."""
    why: str = getattr(model_config, _WHY_NOT_KEEP, "")
    return why
