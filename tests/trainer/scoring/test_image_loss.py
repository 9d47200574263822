# SPDX-License-Identifier: Apache-2.0

from types import SimpleNamespace

import torch
from accelerate import Accelerator

from alphagrpo_ext.objectives import ObjectiveOutput
from alphagrpo_ext.trainer.scoring.image_loss import ImageLoss
from alphagrpo_ext.trajectory import DenoisingWindow, ImageSegment, Trajectory


def test_a_trajectory_with_two_rounds_weighs_as_much_as_one_with_one() -> None:
    window = DenoisingWindow(torch.zeros(3, 1, 1), torch.tensor([0.9, 0.8, 0.7]), start=0, log_probs=torch.zeros(2))
    image = ImageSegment(torch.zeros(1, 1), (1, 1), sampled=True, window=window)
    losses = torch.tensor([6.0, 1.0, 3.0], requires_grad=True)
    loss = ImageLoss(
        lambda *args, **kwargs: ObjectiveOutput(losses, {}), weight=1.0, accelerator=Accelerator(cpu=True)
    )
    scores = SimpleNamespace(
        velocities=torch.zeros(3, 2, 1, 1), t=torch.zeros(3, 2), trajectory=torch.tensor([0, 1, 1])
    )
    inputs = {
        "image_advantages": torch.ones(2),
        "is_scored": torch.ones(2, dtype=torch.bool),
        "trajectories": [Trajectory([image]), Trajectory([image, image])],
    }

    output = loss(scores, inputs).loss
    output.backward()

    assert output.item() == (6 + (1 + 3) / 2) / 2
    assert losses.grad.tolist() == [0.5, 0.25, 0.25]

    losses.grad = None
    loss(scores, inputs | {"is_scored": torch.tensor([True, False])}).loss.backward()
    assert losses.grad.tolist() == [0.5, 0.0, 0.0]
