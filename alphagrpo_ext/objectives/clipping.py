# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""PPO's clipped surrogate, which objectives with a ratio share."""

from __future__ import annotations

import torch


def clipped_surrogate(
    ratio: torch.Tensor, advantages: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `-min(r A, clip(r, 1 - eps, 1 + eps) A)` (https://huggingface.co/papers/1707.06347, equation 7).

    Args:
        ratio (`torch.Tensor` of shape `(images, K)`): Ratio r of new to old likelihood.
        advantages (`torch.Tensor` of shape `(images,)`): Advantage A.
        epsilon (`float`): Clip range.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: Loss and whether clipping took the gradient away, both `(images, K)`.
    """
    advantages = advantages[:, None]
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)
    loss = -torch.minimum(ratio * advantages, clipped * advantages)
    is_clipped = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon) & (advantages > 0))
    return loss, is_clipped
