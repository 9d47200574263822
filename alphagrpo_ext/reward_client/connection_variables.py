# SPDX-License-Identifier: Apache-2.0

"""The environment variables of certificates and proxies, which httpx reads, in messages about connections that fail."""

from __future__ import annotations

import os
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from alphagrpo_ext.reward_client.addresses import without_password


_CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def describe_unmade_client(error: Exception) -> str:
    """
    Say why a client of httpx cannot be made, and which variables it was made with.

    Args:
        error (`Exception`): What its constructor raised. Of the operating system or of OpenSSL, it is about certificates.
    """
    if isinstance(error, OSError):
        # httpx reads the first that is set.
        variables = [f"{name}={os.environ[name]!r}" for name in _CERTIFICATES if os.environ.get(name)][:1]
    else:
        # The address of a proxy may hold a password.
        variables = [name for name in os.environ if name.upper() in _PROXIES and os.environ[name]]
    advice = f"; check the environment variable {' or '.join(variables)}" if variables else ""
    return f"{type(error).__name__}: {str(error).removesuffix('.')}{advice}"


def proxy_hint(url: str) -> str:
    """Say through which proxy requests to an address go, or nothing if they go through none."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or not parts.hostname or proxy_bypass(parts.hostname):
        return ""
    return (
        f". Requests go through the proxy {without_password(proxy)}: check the environment variables "
        f"{', '.join(_PROXIES)}, or name {parts.hostname} in NO_PROXY"
    )
