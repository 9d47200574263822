# SPDX-License-Identifier: Apache-2.0

"""Whether all values of tensors are finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.distributed.tensor import DTensor


def is_finite(tensor: torch.Tensor) -> torch.Tensor:
    """
    Whether no value of a tensor is NaN or infinite, as a boolean tensor of shape `()` on its device.

    Least and largest value are found in one pass and without a copy. `torch.isfinite` would make copies of the whole tensor.
    """
    # A process looks at its own part of a sharded tensor.
    tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if not tensor.numel() or not tensor.is_floating_point():
        return torch.tensor(True, device=tensor.device)
    # NaN passes into both.
    least, largest = tensor.detach().aminmax()
    return least.isfinite() & largest.isfinite()


def names_not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """Names of the tensors that have a value that is NaN or infinite."""
    flags = [(name, is_finite(tensor)) for name, tensor in tensors]
    # All are computed before the first is read, so that a GPU is waited for once.
    return [name for name, flag in flags if not flag]


def check_finite_weights(tensors: Iterable[tuple[str, torch.Tensor]], purpose: str) -> None:
    """
    Check that all values are finite.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): Tensors with their names.
        purpose (`str`): What the message begins with, e.g. `"cannot save the model"`.

    Raises:
        `FloatingPointError`: If a tensor has NaN or infinite values; the message names the first ones.
    """
    names = names_not_finite(tensors)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise FloatingPointError(f"{purpose}: values are NaN or infinite in {', '.join(names[:5])}{more}")
