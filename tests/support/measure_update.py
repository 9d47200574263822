# SPDX-License-Identifier: Apache-2.0

"""Updates a real model and prints the memory that it took at most: run in a process of its own, as the peak is a process's."""

import json
import sys
from pathlib import Path

import torch
from peft.helpers import disable_input_dtype_casting

from alphagrpo_ext.models.contract import FAMILIES
from alphagrpo_ext.objectives import OBJECTIVES, ImageScores, ObjectiveConfig
from recipe_tools.memory import build_policy, example_trajectories
from recipe_tools.memory_settings import MemorySettings


def status(name: str) -> int:
    """A size of this process in bytes: `VmRSS` now, or `VmHWM`, its peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def micro_step(policy: torch.nn.Module, model: torch.nn.Module, settings: MemorySettings) -> None:
    """Forward, Flow-GRPO's loss and backward."""
    trajectories = example_trajectories(model, settings)
    batch = model.pack(trajectories, settings.guidance)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=settings.autocast),
        disable_input_dtype_casting(policy, active=settings.autocast),
    ):
        output = policy(**batch.inputs)
    scores = ImageScores.from_packed(trajectories, batch, output)
    objective = OBJECTIVES.get("flow_grpo")(ObjectiveConfig())
    loss = objective(scores, torch.linspace(-1, 1, len(trajectories))).loss.mean()
    if len(output.log_probs):
        loss = loss - output.log_probs.mean()
    loss.backward()


def main(config: str, settings: str) -> None:
    """
    Args:
        config (`str`): Configuration of a model of any family as JSON.
        settings (`str`): [`MemorySettings`] as JSON.
    """
    settings, values = MemorySettings(**json.loads(settings)), json.loads(config)
    # A family is imported at first use.
    config_class = FAMILIES.get(values["model_type"]).model_class.config_class
    # Libraries allocate buffers of their own at first use.
    layer = torch.nn.Linear(64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        layer.to(dtype)(torch.ones(64, 64, dtype=dtype)).sum().backward()
        layer.zero_grad()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    model, policy = build_policy(config_class.from_dict(values), settings)
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], fused=True)
    for _ in range(2):
        for _ in range(2):
            micro_step(policy, model, settings)
        optimizer.step()
        optimizer.zero_grad()
    sys.stdout.write(f"{status('VmHWM') - before}\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
