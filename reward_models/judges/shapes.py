# SPDX-License-Identifier: Apache-2.0

"""The judge of the shapes world, which reads the answers from the pixels."""

from collections.abc import Sequence

from PIL import Image

from alphagrpo_ext.shapes.judge import answer_questions, is_answerable
from alphagrpo_ext.shapes.scene import IMAGE_SIZE
from reward_models.judges.base import JUDGES, Judge


@JUDGES.register("shapes")
class ShapesJudge(Judge):
    """
    Answers the questions of the shapes world from the pixels of 24 x 24 images. The answer to a question outside its
    templates is `None`. An image of another size is an error. The judge needs neither a network nor a model.
    """

    is_light = True

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        answers = answer_questions(image, questions)
        if None in answers:
            unknown = questions[answers.index(None)]
            self.last_failure = f"the judge 'shapes' answers only questions of the shapes world, not {unknown!r}"
        return answers

    def validate_question(self, question: str) -> None:
        if not is_answerable(question):
            raise ValueError(
                f"the judge 'shapes' reads the pixels of the shapes world and cannot answer {question!r}: for other prompts "
                "choose another judge, e.g. --judge openai --judge_base_url http://localhost:8000/v1"
            )

    def validate_image_size(self, height: int, width: int) -> None:
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the judge 'shapes' reads images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, but image_height x image_width "
                f"is {height} x {width}"
            )
