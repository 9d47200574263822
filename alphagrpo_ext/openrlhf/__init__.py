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

"""
The plug-in for OpenRLHF: DVReward and self-reflection for a policy that OpenRLHF trains.

OpenRLHF loads `reward_file.py` (`--reward.remote_url`) or `agent_file.py` (`--train.agent_func_path`) by path, inside its
Ray actors. Both ask a reward server (`python -m reward_models.server`), which paints and judges, and are set by
environment variables alone: see `environment.py`. The server's own `/get_reward` does what `reward_file.py` does, for a
server without a key: OpenRLHF sends none.
"""
