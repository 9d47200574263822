# SPDX-License-Identifier: Apache-2.0

"""The conformance suite on tiny random Cosmos3 models of both variants."""

import pytest

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
