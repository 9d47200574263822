# SPDX-License-Identifier: Apache-2.0


import csv
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from reward_models.evaluation.comparisons import compare_models
from reward_models.evaluation.results import save_results
from reward_models.evaluation.samples import EvaluatedSample, Evaluation
from reward_models.evaluation.scores import NamedEvaluation, first_failed_question, score_evaluation
from reward_models.evaluation.statistics import bootstrap_mean, holm_p_values, paired_difference
from reward_models.evaluation.text_tables import (
    comparison_table,
    difference_table,
    overall_line,
    refinement_table,
    score_table,
    table_legend,
)
from reward_models.prompts.questions import PromptRecord, Question


RECORDS = [
    PromptRecord(
        "two circles",
        (
            Question("Are there two circles?", "Count"),
            Question("Not asked?", "Style", False),
            Question("Red?", "Attribute"),
        ),
        (Question("Sharp?", "Geometry"),),
    ),
    PromptRecord("a square", (Question("Is there a square?", "Existence"),), ()),
    PromptRecord("three squares", (Question("Are there three squares?", "Count"),), ()),
]
CATEGORIES = ("colors", "one", "counting")


def sample(index: int, seed: int, semantic: tuple, quality: tuple = (), reward: float | None = 0.5) -> EvaluatedSample:
    answers = (*semantic, *quality)
    passed = None if None in answers else all(answer >= 0.5 for answer in answers)
    return EvaluatedSample(
        index,
        seed,
        CATEGORIES[index],
        RECORDS[index].prompt,
        f"thought {index}",
        None,
        reward,
        passed,
        semantic,
        quality,
    )


OLD = Evaluation(
    [
        sample(0, 0, (0.9, 0.2), (0.6,), 0.5),
        sample(1, 0, (0.1,), (), 0.1),
        sample(2, 0, (0.4,), (), 0.4),
        sample(0, 1, (0.7, 0.8), (0.9,), 0.8),
        sample(1, 1, (None,), (), None),
        sample(2, 1, (0.6,), (), 0.6),
    ]
)
NEW = Evaluation(
    [
        sample(0, 0, (0.9, 0.9), (0.8,), 0.8),
        sample(1, 0, (0.7,), (), 0.7),
        sample(2, 0, (None,), (), None),
        sample(0, 1, (0.8, 0.9), (0.9,), 0.9),
        sample(1, 1, (0.9,), (), 0.9),
        sample(2, 1, (0.5,), (), 0.5),
    ]
)
BASELINE, TRAINED = NamedEvaluation("base", "thought", OLD), NamedEvaluation("trained", "thought", NEW)


def test_tags_equal_hand_computation() -> None:
    scores = {tag.name: tag for tag in score_evaluation(BASELINE, RECORDS).tags}
    assert list(scores) == ["Count", "Attribute", "Existence", "Geometry"]
    # Questions that do not count are not asked, so "Red?" is the second answer.
    assert scores["Attribute"].p_yes.value == pytest.approx((0.2 + 0.8) / 2)
    assert scores["Count"].p_yes.value == pytest.approx((0.9 + 0.7 + 0.4 + 0.6) / 4)
    assert scores["Count"].pass_rate.value == pytest.approx(3 / 4)
    assert (scores["Count"].p_yes.num_prompts, scores["Count"].p_yes.num_samples) == (2, 4)
    assert scores["Count"].p_yes == bootstrap_mean([0, 2, 0, 2], [0.9, 0.4, 0.7, 0.6])
    assert (scores["Existence"].p_yes.value, scores["Existence"].num_failed) == (0.1, 1)
    assert (scores["Geometry"].side, scores["Geometry"].pass_rate.value) == ("quality", 1.0)


def test_first_failed_question_is_the_first_no() -> None:
    assert first_failed_question(sample(0, 0, (0.9, 0.2), (0.1,)), RECORDS[0]) == "Red?"
    assert first_failed_question(sample(0, 0, (0.9, 0.6), (0.1,)), RECORDS[0]) == "Sharp?"
    assert first_failed_question(sample(0, 0, (0.9, 0.6), (0.5,)), RECORDS[0]) is None
    # As files of earlier versions have it.
    assert first_failed_question(sample(0, 0, ()), RECORDS[0]) is None


def test_groups_equal_hand_computation() -> None:
    scores = score_evaluation(BASELINE, RECORDS)
    assert scores.total.reward == bootstrap_mean([0, 1, 2, 0, 2], [0.5, 0.1, 0.4, 0.8, 0.6])
    assert scores.total.strict_pass_rate.value == pytest.approx(2 / 5)
    assert scores.total.num_failed == 1
    assert [group.name for group in scores.categories] == list(CATEGORIES)
    assert scores.categories[0].reward.value == pytest.approx(0.65)
    assert scores.refinement is None


def test_refined_images_are_compared_with_the_first() -> None:
    refined = score_evaluation(replace(TRAINED, mode="round 1", initial=OLD), RECORDS)
    assert refined.refinement.num_pairs == 4
    assert refined.refinement.fixed == pytest.approx(2 / 4)


def test_comparison_leaves_out_what_one_of_them_lacks() -> None:
    differences = {entry.name: entry for entry in compare_models(BASELINE, TRAINED, RECORDS).differences}
    assert differences["all"].reward == paired_difference([0, 1, 0, 2], [0.8 - 0.5, 0.7 - 0.1, 0.9 - 0.8, 0.5 - 0.6])
    assert differences["all"].pass_rate.difference.value == pytest.approx(2 / 4)
    assert differences["counting"].reward.difference.num_samples == 1
    count = [0.0, 0.1, 0.5 - 0.6]
    assert differences["Count"].reward.difference.value == pytest.approx(sum(count) / 3)
    assert differences["Attribute"].pass_rate.difference.value == pytest.approx(0.5)


def test_a_tag_that_both_sides_have_is_told_with_its_side(tmp_path: Path) -> None:
    records = [PromptRecord("a logo", (Question("Is it there?", "Brand"),), (Question("Is it sharp?", "Brand"),))]
    old, new = (
        Evaluation([EvaluatedSample(0, 0, "all", "a logo", "", None, value, True, (value,), (0.5,))])
        for value in (0.6, 0.9)
    )
    evaluations = [NamedEvaluation("base", "thought", old), NamedEvaluation("trained", "thought", new)]
    tables = save_results(tmp_path, evaluations, records, {})
    assert tables.count("[Brand, semantic]") == tables.count("[Brand, quality]") == 3
    (comparison,) = json.loads((tmp_path / "evaluation.json").read_text())["comparisons"]
    changes = {(entry["scope"], entry["name"]): entry for entry in comparison["differences"]}
    assert changes["semantic tag", "Brand"]["reward"]["difference"]["value"] == pytest.approx(0.3)
    assert changes["quality tag", "Brand"]["reward"]["difference"]["value"] == 0
    assert "[Count]" in score_table(score_evaluation(BASELINE, RECORDS))


def test_categories_cannot_steer_a_terminal_or_add_rows() -> None:
    names = ("\x1b]0;title\x07\x1b[2J", "all\nall 9 9 1.000")
    old, new = (
        Evaluation([EvaluatedSample(i, 0, name, "a", "", None, value, True, (value,)) for i, name in enumerate(names)])
        for value in (0.5, 0.6)
    )
    evaluations = [NamedEvaluation("base", "direct", old), NamedEvaluation("trained", "direct", new)]
    records = [PromptRecord("a", (Question("Is it?", "Count"),), ())] * 2
    tables = [
        score_table(score_evaluation(evaluations[0], records)),
        difference_table(compare_models(*evaluations, records)),
        comparison_table(old, new),
    ]
    for table in tables:
        assert all(line.isprintable() for line in table.split("\n"))
        assert " ]0;title" in table
        assert sum(line.startswith("all") for line in table.split("\n")) == 2
        assert "all all 9 9" in table


def test_comparison_of_other_samples_is_refused() -> None:
    fewer = replace(TRAINED, evaluation=Evaluation(NEW.samples[:-1]))
    with pytest.raises(ValueError, match="base and trained were evaluated on other prompts"):
        compare_models(BASELINE, fewer, RECORDS)


def test_category_without_scores_has_none() -> None:
    failed = Evaluation([replace(s, reward=None, strict_pass=None) for s in OLD.samples])
    scores = score_evaluation(replace(BASELINE, evaluation=failed), RECORDS)
    assert scores.total.reward.value is None
    assert "-" in score_table(scores).splitlines()[-1].split()
    comparison = compare_models(BASELINE, replace(TRAINED, evaluation=failed), RECORDS)
    assert difference_table(comparison).splitlines()[-1].split() == ["all", "0", "0", *["-"] * 6]
    assert overall_line(comparison).endswith(
        "0 prompts: reward -, nothing to compare; strict pass - points, nothing to compare"
    )


def test_rates_without_a_spread_have_wilsons_interval() -> None:
    passing = Evaluation(
        [replace(s, reward=1.0, strict_pass=True, semantic=(1.0,) * len(s.semantic)) for s in NEW.samples]
    )
    scores = score_evaluation(replace(TRAINED, evaluation=passing), RECORDS)
    rate = scores.total.strict_pass_rate
    assert (rate.value, rate.high, rate.num_prompts) == (1.0, 1.0, 3)
    assert rate.low == pytest.approx(0.4385, abs=1e-4)
    assert (scores.total.reward.value, scores.total.reward.low, scores.total.reward.high) == (1.0, None, None)
    assert score_table(scores).splitlines()[-1].split()[-4:] == ["1.000", "100.0%", "[43.9%,", "100.0%]"]


def test_categories_and_tags_have_corrected_p_values() -> None:
    comparison = compare_models(BASELINE, TRAINED, RECORDS)
    total, *others = comparison.differences
    assert total.reward.holm_p_value is None and total.pass_rate.holm_p_value is None
    for metric in ("reward", "pass_rate"):
        plain = [getattr(entry, metric).p_value for entry in others]
        assert [getattr(entry, metric).holm_p_value for entry in others] == holm_p_values(plain)
    table = difference_table(comparison).splitlines()
    assert table[1].split().count("Holm") == 2
    # Three prompts with four scored pairs.
    assert table[-1].split()[:3] == ["all", "3*", "4"]
    assert set(table[-2]) == {"-"}
    assert [line.split()[0] for line in table[3:-2]] == [
        *CATEGORIES,
        "[Count]",
        "[Attribute]",
        "[Existence]",
        "[Geometry]",
    ]


def test_what_is_printed_ends_with_a_legend_and_the_difference_over_all_prompts(tmp_path: Path) -> None:
    old, new = (
        Evaluation(
            [EvaluatedSample(i, 0, "all", "p", "", None, value, False, (value,), ()) for i, value in enumerate(values)]
        )
        for values in ([0.1] * 30, [0.2 + i / 300 for i in range(30)])
    )
    records = [PromptRecord("p", (Question("Red?", "Attribute"),), ())] * 30
    printed = save_results(
        tmp_path, [NamedEvaluation("base", "thought", old), NamedEvaluation("trained", "thought", new)], records, {}
    )
    *_, legend, overall = printed.split("\n\n")
    assert [line[:16].strip() for line in legend.splitlines()] == [
        "category, all",
        "[tag]",
        "[low, high]",
        "p",
        "p, Holm",
    ]
    assert overall.startswith("overall, base -> trained, thought, 30 prompts: reward +0.148 [")
    assert "], significant at 5% (p 0.0001); strict pass +0.0 points, not significant at 5% (p 1.0000)" in overall


def test_the_legend_explains_what_occurs() -> None:
    records = [PromptRecord(f"p{i}", (Question("Red?", "Attribute"),), ()) for i in range(20)]
    samples = [EvaluatedSample(i, 0, "all", f"p{i}", "", None, i / 20, i % 2 == 0, (i / 20,), ()) for i in range(20)]
    named = NamedEvaluation("base", "thought", Evaluation(samples))
    scores = score_evaluation(named, records)
    assert [line[:16].strip() for line in table_legend([scores], []).splitlines()] == [
        "category, all",
        "[tag]",
        "[low, high]",
    ]
    fewer = score_evaluation(replace(named, evaluation=Evaluation(samples[1:])), records)
    assert "\n*               fewer than 20 prompts" in table_legend([fewer], [])
    assert "19*" in score_table(fewer).splitlines()[-1].split()


def test_rows_without_categories_have_one_line_for_all(tmp_path: Path) -> None:
    old, new = (Evaluation([replace(s, category="all") for s in part.samples]) for part in (OLD, NEW))
    tables = save_results(
        tmp_path, [NamedEvaluation(name, "thought", e) for name, e in (("a", old), ("b", new))], RECORDS, {}
    )
    # Two evaluations and their difference.
    assert len(re.findall(r"\ball +\d", tables)) == 3
    assert comparison_table(old, new).splitlines()[2].split()[:2] == ["all", "5*"]
    for table in (comparison_table(old, new), refinement_table({"before": (old, new)})):
        assert table.splitlines()[-1] == "* fewer than 20 prompts: too few to tell a change from chance"


FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "  =1",
    "=cmd|' /C calc'!A0",
    "\uff1d1",
    "-",
    "+",
]


@pytest.mark.parametrize("text", FORMULAS)
def test_texts_in_the_table_are_no_formulas(tmp_path: Path, text: str) -> None:
    samples = [replace(s, category=text) for s in OLD.samples]
    save_results(tmp_path, [NamedEvaluation(text, text, Evaluation(samples))], RECORDS, {})
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {rows[0]["model"], rows[0]["mode"], rows[1]["name"]} == {"'" + text.replace("\r", "\n")}
    # The other files hold the text itself.
    assert json.loads((tmp_path / "samples.jsonl").read_text().splitlines()[0])["model"] == text


@pytest.mark.parametrize("text", ["-5", "+0.25", "-1e-3", "a=b", "model-v2", "'quoted'", "1-2"])
def test_other_texts_and_numbers_stay_as_they_are(tmp_path: Path, text: str) -> None:
    save_results(tmp_path, [replace(BASELINE, model=text)], RECORDS, {})
    with (tmp_path / "summary.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {text}
    assert float(rows[0]["reward_value"]) == pytest.approx(0.48)


def test_files_hold_everything(tmp_path: Path) -> None:
    image_file = tmp_path / "images" / "a.png"
    image_file.parent.mkdir()
    Image.new("RGB", (2, 2)).save(image_file)
    kept = Evaluation([replace(s, image_file=str(image_file)) for s in OLD.samples])
    evaluations = [
        replace(BASELINE, evaluation=kept),
        replace(TRAINED, model="base", mode="round 1", initial=OLD),
        TRAINED,
        replace(TRAINED, mode="direct"),
    ]
    table = save_results(tmp_path, evaluations, RECORDS, {"seed": 3})
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["settings"] == {"seed": 3}
    assert [(e["model"], e["mode"]) for e in content["evaluations"]] == [
        ("base", "thought"),
        ("base", "round 1"),
        ("trained", "thought"),
        ("trained", "direct"),
    ]
    assert content["evaluations"][1]["refinement"]["num_pairs"] == 4
    # The baseline made no images in the mode "direct".
    assert [(c["baseline"], c["model"], c["mode"]) for c in content["comparisons"]] == [("base", "trained", "thought")]
    assert "base -> trained, thought" in table

    with (tmp_path / "summary.csv").open(newline="") as file:
        rows = {(row["model"], row["mode"], row["scope"], row["name"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4 * (1 + 3 + 4)
    total = content["evaluations"][0]["total"]["reward"]
    assert float(rows["base", "thought", "all", "all"]["reward_low"]) == total["low"]
    assert rows["base", "thought", "semantic tag", "Count"]["pass_rate_value"] == "0.75"
    assert rows["base", "thought", "semantic tag", "Count"]["reward_value"] == ""

    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 4 * 6
    first = lines[0]
    assert (first["model"], first["mode"], first["prompt_index"], first["noise_seed"]) == ("base", "thought", 0, 0)
    assert (first["image"], first["thought"], first["quality"]) == ("images/a.png", "thought 0", 0.6)
    assert first["semantic"] == pytest.approx(0.55)
    assert [answer["question"] for answer in first["answers"]] == ["Are there two circles?", "Red?", "Sharp?"]
    assert lines[4]["semantic"] is None and lines[4]["reward"] is None
