# SPDX-License-Identifier: Apache-2.0

"""The TRL trainer of unified multimodal models."""

from alphagrpo_ext.trainer.config import AlphaGRPOConfig
from alphagrpo_ext.trainer.trainer import AlphaGRPOTrainer


__all__ = ["AlphaGRPOConfig", "AlphaGRPOTrainer"]
