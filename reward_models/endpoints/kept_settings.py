# SPDX-License-Identifier: Apache-2.0

"""What a run keeps of how it asks a model behind an endpoint, so that it resumes with the same model and the same requests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any


def kept_settings(model: str | None, extra_body: Mapping[str, Any] | None, **others: Any) -> dict[str, Any]:
    """
    The settings of requests that answers depend on. Addresses, timeouts and retries are none of them, so that they may change.

    Args:
        model (`str`, *optional*): Name of the model at its endpoint.
        extra_body (`Mapping[str, Any]`, *optional*): Further fields of a request.
        others: What else the answers depend on, e.g. the prompt.
    """
    return {"model": model, "extra_body": _without_texts(extra_body or {}), **others}


def _without_texts(value: Any) -> Any:
    """A value with digests for its texts: a request may hold a key, and settings are written to checkpoints."""
    if isinstance(value, Mapping):
        return {name: _without_texts(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_texts(entry) for entry in value]
    return f"text {hashlib.sha256(value.encode()).hexdigest()[:16]}" if isinstance(value, str) else value
