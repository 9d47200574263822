# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pytest
from pydantic import ValidationError

from reward_models.decomposition.answers import (
    CRITERIA,
    MAX_QUALITY_QUESTIONS,
    Facts,
    QualityQuestions,
    Verdict,
    Verdicts,
)
from reward_models.decomposition.requests import facts_request, quality_request, verification_request
from reward_models.endpoints.structured_output import StructuredAnswer, json_objects
from reward_models.format import ReflectionVerdict
from reward_models.prompts.questions import Question
from reward_models.prompts.tags import QUALITY_TAGS, SEMANTIC_TAGS


def verdict(number: int, tag: str = "Existence", **changes: bool) -> dict[str, Any]:
    return {"number": number, **dict.fromkeys(CRITERIA, True), "tag": tag, **changes}


QUESTIONS = (Question("Is there a cat?", "Existence"), Question("Is it sharp?", "Geometry"))


def test_too_many_quality_questions_are_refused() -> None:
    rows = [{"tag": "Texture", "question": f"Is it {n}?"} for n in range(MAX_QUALITY_QUESTIONS + 1)]
    assert len(QualityQuestions.model_validate({"questions": rows[:-1]}).questions) == MAX_QUALITY_QUESTIONS
    with pytest.raises(ValidationError, match="expected 1 to 16"):
        QualityQuestions.model_validate({"questions": rows})


def test_worked_examples_fit_their_schemas_and_show_every_tag_and_criterion() -> None:
    (example,) = json_objects(facts_request("no braces here"))
    assert {fact.tag for fact in Facts.model_validate(example).facts} == set(SEMANTIC_TAGS)
    (example,) = json_objects(quality_request("no braces here"))
    assert {question.tag for question in QualityQuestions.model_validate(example).questions} == set(QUALITY_TAGS)
    request = verification_request("no braces here", QUESTIONS)
    (example,) = json_objects(request)
    given = Verdicts.model_validate(example).verdicts
    assert {name for name in CRITERIA for verdict in given if not getattr(verdict, name)} == set(CRITERIA)
    assert '1. [Existence] "Is there a cat?"\n2. [Geometry] "Is it sharp?"\n' in request


@pytest.mark.parametrize("answer_type", [Facts, QualityQuestions, Verdicts, ReflectionVerdict])
def test_schemas_require_every_field_and_allow_no_other(answer_type: type[StructuredAnswer]) -> None:
    schema = answer_type.model_json_schema()
    for part in (schema, *schema.get("$defs", {}).values()):
        assert part["additionalProperties"] is False
        assert part["required"] == list(part["properties"])


def test_a_truth_value_is_no_number_and_a_number_no_truth_value() -> None:
    for changes in ({"number": True}, {"atomic": 1}):
        with pytest.raises(ValidationError, match=next(iter(changes))):
            Verdict(**verdict(1) | changes)
