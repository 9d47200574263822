# SPDX-License-Identifier: Apache-2.0

"""
The plug-in for OpenRLHF: DVReward and self-reflection for a policy that OpenRLHF trains.

OpenRLHF loads `reward_file.py` (`--reward.remote_url`) or `agent_file.py` (`--train.agent_func_path`) by path, inside its
Ray actors. Both files ask a reward server (`python -m reward_models.server`), which paints and judges. Their settings are
environment variables; see `environment.py`.

The server's own route `/get_reward` does the same as `reward_file.py`, but OpenRLHF sends it no key: for a server with a key,
use the file. Nothing here imports the trainer, the models or the judges: an actor needs only the server's HTTP protocol.
"""

from alphagrpo_ext.files import require_extra


for package in ("httpx", "pydantic_settings", "tenacity"):
    require_extra(package, "openrlhf")
