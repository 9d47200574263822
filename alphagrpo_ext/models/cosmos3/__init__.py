# SPDX-License-Identifier: Apache-2.0

"""Cosmos3, a family of Nano's form and Edge's form. Importing this package registers it with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.modeling_cosmos3 import Cosmos3Model
from alphagrpo_ext.models.cosmos3.processing_cosmos3 import Cosmos3Processor


AutoConfig.register(Cosmos3Config.model_type, Cosmos3Config)
AutoModel.register(Cosmos3Config, Cosmos3Model)
# TRL loads its reference model as a causal language model.
AutoModelForCausalLM.register(Cosmos3Config, Cosmos3Model)
AutoModelForImageTextToText.register(Cosmos3Config, Cosmos3Model)
AutoProcessor.register(Cosmos3Config, Cosmos3Processor)

__all__ = ["Cosmos3Config", "Cosmos3Model", "Cosmos3Processor"]
