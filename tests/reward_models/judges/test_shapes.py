# SPDX-License-Identifier: Apache-2.0

import asyncio

from PIL import Image

from reward_models.judges.shapes import ShapesJudge


def test_a_question_outside_the_world_has_no_answer_and_is_named() -> None:
    judge = ShapesJudge()
    image = Image.new("RGB", (24, 24), "white")
    known, unknown = "is there a red circle ?", "Is it soft?"
    (answer,) = asyncio.run(judge.answer(image, [known]))
    assert answer < 0.5
    assert judge.last_failure is None
    assert asyncio.run(judge.answer(image, [known, unknown])) == [answer, None]
    assert judge.last_failure == f"the judge 'shapes' answers only questions of the shapes world, not {unknown!r}"
    assert judge.take_answer_mass() is None
