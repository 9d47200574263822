# SPDX-License-Identifier: Apache-2.0

from dataclasses import replace

import pytest
import torch

from alphagrpo_ext.flow.guidance import RENORM_TYPES, GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel.guidance import BRANCHES, BagelGuidance, branch_context
from alphagrpo_ext.trajectory import ImageSegment, TextSegment


NAMES = ("v", "v_cfg_text", "v_cfg_img")
"""The reference's names of the velocities, in the order of `BRANCHES`."""


@pytest.fixture
def velocities() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 5, generator=generator) for _ in BRANCHES]


def guide(*velocities: torch.Tensor, mask: torch.Tensor | None = None, **settings) -> torch.Tensor:
    guidance = BagelGuidance(GuidanceConfig(**settings))
    return guidance.combine(dict(zip(BRANCHES, velocities, strict=False)), mask)


def guide_combo(velocities, combo):
    return guide(
        *velocities,
        text_scale=combo["cfg_text_scale"],
        image_scale=combo["cfg_img_scale"],
        renorm_type=combo["cfg_renorm_type"],
        renorm_min=combo["cfg_renorm_min"],
    )


class TestGuide:
    def test_equals_reference(self, golden):
        combos = {combo["key"]: combo for combo in golden.case("unit_cfg")["combos"]}
        checked = set()
        for key in golden.keys("unit/cfg/"):
            folder, name = key.rsplit("/", 1)
            if name in NAMES:
                continue
            velocities = [golden[f"{folder}/{branch}"] for branch in NAMES]
            golden.check(key, guide_combo(velocities, combos[name]))
            checked.add(name)
        assert checked == set(combos)

    def test_equals_reference_on_model_velocities(self, golden):
        combos = {combo["key"]: combo for combo in golden.case("unit_cfg")["combos"]}
        keys = [key for key in golden.keys("flow_") if "/cfg/" in key]
        assert keys
        for key in keys:
            folder, name = key.split("/cfg/")
            names = {"v": "v_gen"}
            velocities = [golden[f"{folder}/{names.get(branch, branch)}"] for branch in NAMES]
            golden.check(key, guide_combo(velocities, combos[name]))

    @pytest.mark.parametrize("renorm_type", RENORM_TYPES)
    @pytest.mark.parametrize("image_scale", [1.0, 2.0])
    def test_samples_do_not_influence_each_other(self, velocities, renorm_type, image_scale):
        settings = dict(text_scale=4.0, image_scale=image_scale, renorm_type=renorm_type)
        batched = guide(*velocities, **settings)
        for i in range(2):
            for j in range(3):
                torch.testing.assert_close(guide(*(v[i, j] for v in velocities), **settings), batched[i, j])

    @pytest.mark.parametrize("renorm_type", RENORM_TYPES)
    def test_padding_changes_nothing(self, velocities, renorm_type):
        settings = dict(text_scale=4.0, image_scale=2.0, renorm_type=renorm_type)
        mask = torch.arange(7) < torch.tensor([[[4]], [[6]]])
        garbage = [v.masked_fill(~mask[..., None], 1e3) for v in velocities]
        guided = guide(*garbage, **settings, mask=mask)
        for i, num_tokens in enumerate((4, 6)):
            alone = guide(*(v[i, :, :num_tokens] for v in velocities), **settings)
            torch.testing.assert_close(guided[i, :, :num_tokens], alone)

    def test_global_norm_never_exceeds_unguided_norm(self, velocities):
        guided = guide(*velocities, text_scale=4.0, image_scale=2.0, renorm_type="global")
        norm, norm_full = (torch.linalg.vector_norm(v, dim=(-2, -1)) for v in (guided, velocities[0]))
        assert (norm <= norm_full * (1 + 1e-6)).all()

    @pytest.mark.parametrize("renorm_type", RENORM_TYPES)
    def test_renorm_min_of_one_is_plain_guidance(self, velocities, renorm_type):
        full, text_dropped, _ = velocities
        guided = guide(full, text_dropped, text_scale=3.0, image_scale=1.0, renorm_type=renorm_type, renorm_min=1.0)
        torch.testing.assert_close(guided, text_dropped + 3.0 * (full - text_dropped))

    def test_image_guidance_is_off_without_text_guidance(self, velocities):
        assert torch.equal(guide(*velocities, text_scale=1.0, image_scale=2.0), velocities[0])

    def test_half_precision_is_computed_in_fp32(self, velocities):
        halves = [v.bfloat16() for v in velocities]
        guided = guide(*halves, text_scale=4.0, image_scale=2.0)
        assert guided.dtype == torch.float32
        assert torch.equal(guided, guide(*(v.float() for v in halves), text_scale=4.0, image_scale=2.0))

    @pytest.mark.parametrize("renorm_type", RENORM_TYPES)
    def test_gradient_reaches_every_branch(self, velocities, renorm_type):
        velocities = [v.requires_grad_() for v in velocities]
        guide(*velocities, text_scale=4.0, image_scale=2.0, renorm_type=renorm_type).square().sum().backward()
        assert all(v.grad.isfinite().all() and v.grad.abs().sum() > 0 for v in velocities)

    def test_rejects_missing_branch(self, velocities):
        with pytest.raises(ValueError, match="velocity of image_dropped"):
            guide(*velocities[:2], text_scale=4.0, image_scale=2.0)


@pytest.mark.parametrize(
    "text_scale, image_scale, num_branches", [(1.0, 2.0, 1), (0.0, 1.0, 1), (1.5, 1.0, 2), (1.5, 1.5, 3)]
)
def test_branches_are_exactly_those_that_matter(velocities, text_scale, image_scale, num_branches):
    assert BagelGuidance(GuidanceConfig(text_scale, image_scale)).branches == BRANCHES[:num_branches]

    def guided(velocities):
        return guide(*velocities, text_scale=text_scale, image_scale=image_scale)

    for i in range(len(velocities)):
        changed = [v + (i == j) for j, v in enumerate(velocities)]
        assert torch.equal(guided(velocities), guided(changed)) == (i >= num_branches)


def test_branches_along_a_path_equal_the_reference(golden):
    paths = {name: case for name, case in golden.cases.items() if name.startswith("ode/") and "steps" in case}
    assert paths
    for case in paths.values():
        arguments = case["args"]
        timesteps = flow_timesteps(arguments["num_timesteps"], arguments["timestep_shift"])
        settings = GuidanceConfig(
            arguments["cfg_text_scale"], arguments["cfg_img_scale"], tuple(arguments["cfg_interval"])
        )
        needed = [BagelGuidance(settings).branches_at(t) for t in timesteps[:-1]]
        steps = [
            replace(settings, text_scale=s["cfg_text_scale"], image_scale=s["cfg_img_scale"]) for s in case["steps"]
        ]
        assert needed == [BagelGuidance(step).branches for step in steps]


def test_does_not_guide_outside_the_interval(velocities):
    guidance = BagelGuidance(GuidanceConfig(4.0, 2.0, (0.4, 1.0)))
    assert guidance.branches_at(0.7) == guidance.branches == BRANCHES
    assert guidance.branches_at(0.4) == ("full",)
    assert torch.equal(guidance.combine({"full": velocities[0]}), velocities[0])


class TestBranchContext:
    SYSTEM, REQUEST, NEXT_REQUEST = TextSegment([1], role="system"), TextSegment([2]), TextSegment([3])
    IMAGE = ImageSegment(torch.zeros(1, 1), (1, 1))
    THOUGHT = TextSegment([4], role="assistant")
    PAINTED = [TextSegment([5], sampled=True, ended=False), ImageSegment(torch.ones(1, 1), (1, 1), sampled=True)]

    @pytest.mark.parametrize(
        ("context", "text_dropped", "image_dropped"),
        [
            ([SYSTEM, REQUEST], [SYSTEM], [SYSTEM, REQUEST]),
            ([REQUEST], [], [REQUEST]),
            ([SYSTEM, IMAGE, REQUEST], [SYSTEM, IMAGE], [SYSTEM, REQUEST]),
            ([SYSTEM, IMAGE, REQUEST, THOUGHT], [SYSTEM, IMAGE], [SYSTEM, REQUEST]),
            (
                [SYSTEM, IMAGE, REQUEST, *PAINTED, NEXT_REQUEST],
                [SYSTEM, IMAGE, REQUEST, *PAINTED],
                [SYSTEM, REQUEST, NEXT_REQUEST],
            ),
        ],
        ids=["text-to-image", "no system prompt", "editing", "given thought", "second turn"],
    )
    def test_drops(self, context, text_dropped, image_dropped):
        assert branch_context("full", context) == context
        assert [id(s) for s in branch_context("text_dropped", context)] == [id(s) for s in text_dropped]
        assert [id(s) for s in branch_context("image_dropped", context)] == [id(s) for s in image_dropped]

    def test_unknown_branch_lists_the_known(self):
        with pytest.raises(ValueError, match="'none'.*full, text_dropped, image_dropped"):
            branch_context("none", [])
