# SPDX-License-Identifier: Apache-2.0

import asyncio

from PIL import Image

from reward_models.judges.shapes import ShapesJudge


def test_a_question_outside_the_world_has_no_answer_and_is_named() -> None:
    judge = ShapesJudge()
    image = Image.new("RGB", (24, 24), "white")
    assert asyncio.run(judge.answer(image, ["is there a red circle ?"])) == [0.0]
    assert judge.last_failure is None
    first, second = asyncio.run(judge.answer(image, ["is there a red circle ?", "Does the fur look soft?"]))
    assert (first, second) == (0.0, None)
    assert (
        judge.last_failure
        == "the judge 'shapes' answers only questions of the shapes world, not 'Does the fur look soft?'"
    )
    assert judge.take_answer_mass() is None
