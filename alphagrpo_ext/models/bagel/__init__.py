# SPDX-License-Identifier: Apache-2.0

"""BAGEL. Importing this package registers it with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from alphagrpo_ext.models.bagel.configuration_bagel import LORA_TARGET_MODULES, BagelConfig
from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor


AutoConfig.register(BagelConfig.model_type, BagelConfig)
AutoModel.register(BagelConfig, BagelModel)
# TRL loads its reference model as a causal language model.
AutoModelForCausalLM.register(BagelConfig, BagelModel)
AutoModelForImageTextToText.register(BagelConfig, BagelModel)
AutoProcessor.register(BagelConfig, BagelProcessor)

__all__ = ["LORA_TARGET_MODULES", "BagelConfig", "BagelModel", "BagelProcessor"]
