# Copyright 2026 The AlphaGRPO-Ext Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The judge of the shapes world: it reads the answer off the pixels."""

from collections.abc import Sequence

from PIL import Image

from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.scene import IMAGE_SIZE

from .base import JUDGES, Judge


@JUDGES.register("shapes")
class ShapesJudge(Judge):
    """
    Answers the questions of the shapes world from the pixels of 24x24 images. A question outside its templates is
    `None`; an image of another size is an error. It needs neither network nor model.
    """

    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        return answer_questions(image, questions)

    def validate_image_size(self, height: int, width: int) -> None:
        if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
            raise ValueError(
                f"the judge 'shapes' reads images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, but image_height x image_width "
                f"is {height} x {width}"
            )
