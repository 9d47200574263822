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

"""BAGEL. Importing this package registers it with Transformers' Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from alphagrpo_ext.models.bagel.configuration_bagel import LORA_TARGET_MODULES, LORA_TARGET_MODULES_OF, BagelConfig
from alphagrpo_ext.models.bagel.modeling_bagel import BagelModel
from alphagrpo_ext.models.bagel.processing_bagel import BagelProcessor


AutoConfig.register(BagelConfig.model_type, BagelConfig)
AutoModel.register(BagelConfig, BagelModel)
# TRL loads its reference model as a causal language model.
AutoModelForCausalLM.register(BagelConfig, BagelModel)
AutoModelForImageTextToText.register(BagelConfig, BagelModel)
AutoProcessor.register(BagelConfig, BagelProcessor)

__all__ = ["LORA_TARGET_MODULES", "LORA_TARGET_MODULES_OF", "BagelConfig", "BagelModel", "BagelProcessor"]
