# SPDX-License-Identifier: Apache-2.0

"""The conformance suite on tiny random Cosmos3 models of both variants."""

import pytest
import torch

from alphagrpo_ext.models.cosmos3 import Cosmos3Processor
from models.conformance import FamilyCase, FamilyConformance
from models.cosmos3.tiny_cosmos3 import make_tiny_model, make_tiny_tokenizer


def make_case(variant: str, **settings: str) -> FamilyCase:
    """A model that paints images of two tokens, and whose vision tower reads images as small as they are."""
    processor = Cosmos3Processor(
        make_tiny_tokenizer(variant),
        use_system_prompt=variant == "omni",
        # Every letter is a token.
        thinking_prompt="Think.",
        reflection_prompt="Mend: {prompt}",
        rewriting_prompt="Rewrite.",
        min_pixels=32 * 32,
        **settings,
    )
    # A reply of Edge begins with a thought, unless it is told not to.
    return FamilyCase(make_tiny_model(variant), processor, (32, 64), answers_begin_as_replies=variant == "omni")


@torch.no_grad()
@pytest.mark.parametrize("variant", ["omni", "edge"])
def test_linear_layers_read_what_was_rounded_once(variant: str) -> None:
    """Under autocast, no projection or MLP rounds an input of its own."""
    case, types = make_case(variant), set()
    layers = [getattr(layer, name) for layer in case.model.transformer.layers for name in ("mlp", "mlp_moe_gen")]
    layers += [layer.self_attn.to_q for layer in case.model.transformer.layers]
    layers += [layer.self_attn.add_q_proj for layer in case.model.transformer.layers]
    trajectories = case.sample("reasoning_t2i")
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: types.add(inputs[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        case.score(trajectories)
    assert types == {torch.bfloat16}


class TestOmni(FamilyConformance):
    @pytest.fixture
    def case(self) -> FamilyCase:
        return make_case("omni")


class TestEdge(FamilyConformance):
    @pytest.fixture
    def case(self) -> FamilyCase:
        return make_case("edge")


class TestRewriting(FamilyConformance):
    """Images are painted from contexts that hold the sampled texts as requests."""

    @pytest.fixture
    def case(self) -> FamilyCase:
        return make_case("edge", thought_context="rewrite")
