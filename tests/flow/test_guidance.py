# SPDX-License-Identifier: Apache-2.0

import math
from dataclasses import replace

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig, PlainGuidance, in_interval


class TestInInterval:
    def test_includes_the_upper_bound_only(self):
        times = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
        assert in_interval(times, (0.25, 0.75)).tolist() == [False, False, True, True, False]

    def test_same_for_tensors_and_floats_at_a_bound(self):
        # 0.4 in fp32 is above 0.4 in double precision.
        assert torch.tensor(0.4).item() > 0.4
        for t in (torch.tensor(0.4), torch.tensor(0.4).item(), 0.4):
            assert not in_interval(t, (0.4, 1.0))
            assert in_interval(t, (0.0, 0.4))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(renorm_type="local"), "renorm_type 'local'.*global, channel, text_channel"),
        (dict(renorm_min=-0.1), "renorm_min .* -0.1"),
        (dict(renorm_min=1.5), "renorm_min .* 1.5"),
        (dict(renorm_min=math.nan), "renorm_min .* nan"),
        (dict(interval=(0.8, 0.2)), r"interval .* \(0.8, 0.2\)"),
    ],
)
def test_settings_reject_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GuidanceConfig(), **change)


def test_settings_without_effect_are_equal():
    off = [GuidanceConfig(1.0, 2.0, (0.0, 1.0), "text_channel"), GuidanceConfig(0.0)]
    assert off[0].effective == off[1].effective != off[0]
    on = GuidanceConfig(1.5, 2.0, (0.0, 1.0), "text_channel")
    assert on.effective is on


class TestPlainGuidance:
    VELOCITIES = dict(
        zip(("full", "negative"), torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0)), strict=True)
    )

    def test_needs_the_negative_branch_inside_the_interval_alone(self):
        guidance = PlainGuidance(GuidanceConfig(4.0, interval=(0.4, 1.0)))
        assert guidance.branches == guidance.branches_at(0.7) == ("full", "negative")
        assert guidance.branches_at(0.4) == ("full",)
        assert PlainGuidance(GuidanceConfig(text_scale=1.0)).branches == ("full",)

    def test_without_renormalisation_is_linear(self):
        full, negative = self.VELOCITIES.values()
        guidance = PlainGuidance(GuidanceConfig(3.0, renorm_min=1.0))
        torch.testing.assert_close(guidance.combine(self.VELOCITIES), negative + 3.0 * (full - negative))
        assert torch.equal(guidance.combine({"full": full}), full)

    @pytest.mark.parametrize(("renorm_type", "dims"), [("global", (-2, -1)), ("channel", -1)])
    def test_norm_never_exceeds_the_unguided_norm(self, renorm_type, dims):
        guided = PlainGuidance(GuidanceConfig(4.0, renorm_type=renorm_type)).combine(self.VELOCITIES)
        norm, norm_full = (torch.linalg.vector_norm(v, dim=dims) for v in (guided, self.VELOCITIES["full"]))
        assert (norm <= norm_full * (1 + 1e-6)).all()

    def test_padding_changes_nothing(self):
        guidance = PlainGuidance(GuidanceConfig(4.0))
        mask = (torch.arange(7) < 4).expand(3, 7)
        garbage = {name: v.masked_fill(~mask[..., None], 1e3) for name, v in self.VELOCITIES.items()}
        alone = guidance.combine({name: v[:, :4] for name, v in self.VELOCITIES.items()})
        torch.testing.assert_close(guidance.combine(garbage, mask)[:, :4], alone)

    def test_renormalisation_before_image_guidance_is_that_of_channels(self):
        by_type = [
            PlainGuidance(GuidanceConfig(4.0, renorm_type=name)).combine(self.VELOCITIES)
            for name in ("text_channel", "channel")
        ]
        assert torch.equal(*by_type)
