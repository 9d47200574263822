# SPDX-License-Identifier: Apache-2.0

"""
The plug-in for OpenRLHF: DVReward and self-reflection for a policy that OpenRLHF trains.

OpenRLHF loads `reward_file.py` (`--reward.remote_url`) or `agent_file.py` (`--train.agent_func_path`) by path, inside its
Ray actors. Both ask a reward server (`python -m reward_models.server`), which paints and judges, and are set by
environment variables alone: see `environment.py`. The server's own `/get_reward` does what `reward_file.py` does, for a
server without a key: OpenRLHF sends none.
"""
