# SPDX-License-Identifier: Apache-2.0

"""The range of TRL versions that the trainer is tested with."""

from __future__ import annotations

from packaging.version import Version


TESTED_TRL = (Version("1.16.0"), Version("1.17.0"))


def check_trl_version(version: str) -> None:
    """
    Raises:
        `ImportError`: If `version` lies outside the tested range. The trainer overrides private methods of TRL, which
            another version may have changed without an error.
    """
    low, high = TESTED_TRL
    if not low <= Version(version) < high:
        raise ImportError(
            f"alphagrpo_ext.trainer is tested with trl>={low},<{high}, but trl {version} is installed. Install a "
            f"tested version: pip install 'trl>={low},<{high}'"
        )
