# SPDX-License-Identifier: Apache-2.0

"""Scores of an evaluation, by category and by tag of the questions, with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alphagrpo_ext.report.records import REWARD_TOLERANCE
from reward_models.dvreward import PASS_THRESHOLD
from reward_models.evaluation.samples import EvaluatedSample, Evaluation, named_categories
from reward_models.evaluation.statistics import Estimate, bootstrap_mean, estimate_rate, standard_error
from reward_models.prompts.questions import PromptRecord, Question


SIDES = ("semantic", "quality")


@dataclass(frozen=True)
class NamedEvaluation:
    """
    An evaluation with the name of its model.

    Args:
        model (`str`): Name of the model.
        mode (`str`): How the images were made, e.g. `"thought"`.
        evaluation ([`Evaluation`]): The samples.
        initial ([`Evaluation`], *optional*): If the images are refined ones, the images that they started from.
    """

    model: str
    mode: str
    evaluation: Evaluation
    initial: Evaluation | None = None


@dataclass(frozen=True)
class GroupScore:
    """
    Scores of all prompts or of the prompts of a category.

    Args:
        scope (`str`): `"all"` or `"category"`.
        name (`str`): Name of the category, or `"all"`.
        reward ([`Estimate`]): Mean reward.
        strict_pass_rate ([`Estimate`]): Share of samples for which the answer to every question is yes.
        num_failed (`int`): Number of samples that could not be scored.
    """

    scope: str
    name: str
    reward: Estimate
    strict_pass_rate: Estimate
    num_failed: int


@dataclass(frozen=True)
class TagScore:
    """
    Scores of the questions with one tag, over all prompts.

    Args:
        side (`str`): `"semantic"` or `"quality"`.
        name (`str`): The tag.
        p_yes ([`Estimate`]): Mean P(yes).
        pass_rate ([`Estimate`]): Share of answers that are yes.
        num_failed (`int`): Number of questions without an answer.
    """

    side: str
    name: str
    p_yes: Estimate
    pass_rate: Estimate
    num_failed: int


@dataclass(frozen=True)
class RefinementScore:
    """
    The effect of a refinement on the images that it started from. Shares are of all pairs that could be scored.

    Args:
        improved, worsened, unchanged (`float`): By reward; a change of at most 0.01 counts as unchanged.
        fixed (`float`): Images that pass strictly after the refinement and did not before.
        broken (`float`): Images that passed strictly before the refinement and do not after.
        num_pairs (`int`): Number of pairs that could be scored.
        gain_error (`float`, *optional*): Standard error of `fixed - broken`; see [`gain_error`].
    """

    improved: float
    worsened: float
    unchanged: float
    fixed: float
    broken: float
    num_pairs: int
    gain_error: float | None

    @classmethod
    def from_evaluations(cls, initial: Evaluation, refined: Evaluation) -> RefinementScore:
        """Compare the evaluations of the same rows and seeds before and after a refinement."""
        pairs = scored_pairs(initial.samples, refined.samples)
        changes = [new.reward - old.reward for old, new in pairs]
        count = max(len(pairs), 1)
        return cls(
            improved=sum(change > REWARD_TOLERANCE for change in changes) / count,
            worsened=sum(change < -REWARD_TOLERANCE for change in changes) / count,
            unchanged=sum(abs(change) <= REWARD_TOLERANCE for change in changes) / count,
            fixed=sum(new.strict_pass and not old.strict_pass for old, new in pairs) / count,
            broken=sum(old.strict_pass and not new.strict_pass for old, new in pairs) / count,
            num_pairs=len(pairs),
            gain_error=gain_error(initial, refined),
        )


def gain_error(before: Evaluation, after: Evaluation) -> float | None:
    """
    Compute the standard error, clustered by prompt, of the change of the strict pass rate between two evaluations of the same
    rows and seeds; `None` with fewer than two prompts.
    """
    pairs = scored_pairs(before.samples, after.samples)
    changes = [float(new.strict_pass) - float(old.strict_pass) for old, new in pairs]
    return standard_error([old.index for old, _ in pairs], changes)


@dataclass(frozen=True)
class StopRates:
    """
    What a policy that may keep its images made of right ones, which pass strictly, and of wrong ones. `None` if there are none.

    Args:
        right_kept, broken (`float`, *optional*): Shares of right images that it kept, and that fail after the rounds.
        wrong_kept, fixed (`float`, *optional*): Shares of wrong images that it kept, and that pass after the rounds.
    """

    right_kept: float | None
    broken: float | None
    wrong_kept: float | None
    fixed: float | None

    @classmethod
    def from_evaluations(cls, initial: Evaluation, refined: Evaluation) -> StopRates:
        """Compare the evaluations of the same rows and seeds before and after a refinement."""
        pairs = scored_pairs(initial.samples, refined.samples)
        right = [new for old, new in pairs if old.strict_pass]
        wrong = [new for old, new in pairs if not old.strict_pass]

        def share(flags: list[bool]) -> float | None:
            return sum(flags) / len(flags) if flags else None

        return cls(
            right_kept=share([new.is_kept for new in right]),
            broken=share([not new.strict_pass for new in right]),
            wrong_kept=share([new.is_kept for new in wrong]),
            fixed=share([bool(new.strict_pass) for new in wrong]),
        )


@dataclass(frozen=True)
class EvaluationScores:
    """
    All scores of one evaluation.

    Args:
        model (`str`): Name of the model.
        mode (`str`): How the images were made.
        total ([`GroupScore`]): Scores of all prompts.
        categories (`list[GroupScore]`): Scores by category, in order of appearance.
        tags (`list[TagScore]`): Scores by side and tag, in order of appearance.
        refinement ([`RefinementScore`], *optional*): If the images are refined ones, the effect of the refinement.
    """

    model: str
    mode: str
    total: GroupScore
    categories: list[GroupScore]
    tags: list[TagScore]
    refinement: RefinementScore | None = None


@dataclass(frozen=True)
class QuestionAnswer:
    """
    The answer to one question about one sample.

    Args:
        sample ([`EvaluatedSample`]): The sample.
        side (`str`): `"semantic"` or `"quality"`.
        question ([`Question`]): The question.
        p_yes (`float` or `None`): P(yes); `None` if there is no answer.
    """

    sample: EvaluatedSample
    side: str
    question: Question
    p_yes: float | None

    @property
    def passed(self) -> bool:
        """Whether the answer is yes."""
        return self.p_yes >= PASS_THRESHOLD


def score_evaluation(evaluation: NamedEvaluation, records: Sequence[PromptRecord]) -> EvaluationScores:
    """
    Compute the scores of an evaluation.

    Args:
        evaluation ([`NamedEvaluation`]): The evaluation.
        records (`Sequence[PromptRecord]`): The record of each row.
    """
    samples, initial = evaluation.evaluation.samples, evaluation.initial
    groups = named_categories(samples)
    return EvaluationScores(
        model=evaluation.model,
        mode=evaluation.mode,
        total=_group_score("all", "all", samples),
        categories=[_group_score("category", name, group) for name, group in groups.items()],
        tags=[_tag_score(side, tag, answers) for (side, tag), answers in answers_by_tag(samples, records).items()],
        refinement=initial and RefinementScore.from_evaluations(initial, evaluation.evaluation),
    )


def scored_pairs(
    before: Sequence[EvaluatedSample], after: Sequence[EvaluatedSample]
) -> list[tuple[EvaluatedSample, EvaluatedSample]]:
    """Pair the samples of two evaluations of the same rows and seeds. Pairs with a sample that has no reward are left out."""
    pairs = zip(before, after, strict=True)
    return [(old, new) for old, new in pairs if old.reward is not None and new.reward is not None]


def sample_answers(sample: EvaluatedSample, record: PromptRecord) -> list[QuestionAnswer]:
    """The answers about a sample, semantic ones first."""
    questions = {"semantic": record.valid_semantic_questions, "quality": record.valid_quality_questions}
    return [
        QuestionAnswer(sample, side, question, p_yes)
        for side in SIDES
        for question, p_yes in zip(questions[side], getattr(sample, side), strict=True)
    ]


def first_failed_question(sample: EvaluatedSample, record: PromptRecord) -> str | None:
    """The first question of a sample that is answered no; `None` if there is none, or if the sample was kept without answers."""
    answers = sample_answers(sample, record) if sample.semantic or sample.quality else []
    failed = (answer for answer in answers if answer.p_yes is not None and not answer.passed)
    return next((answer.question.question for answer in failed), None)


def answers_by_tag(
    samples: Sequence[EvaluatedSample], records: Sequence[PromptRecord]
) -> dict[tuple[str, str], list[QuestionAnswer]]:
    """Group the answers about all samples by side and tag. Two evaluations of the same samples have the same order."""
    answers = [answer for sample in samples for answer in sample_answers(sample, records[sample.index])]
    groups: dict[tuple[str, str], list[QuestionAnswer]] = {}
    # The sort is stable, so semantic tags come first, in order of appearance.
    for answer in sorted(answers, key=lambda answer: SIDES.index(answer.side)):
        groups.setdefault((answer.side, answer.question.tag), []).append(answer)
    return groups


def _group_score(scope: str, name: str, samples: Sequence[EvaluatedSample]) -> GroupScore:
    scored = [sample for sample in samples if sample.reward is not None]
    prompts = [sample.index for sample in scored]
    return GroupScore(
        scope=scope,
        name=name,
        reward=bootstrap_mean(prompts, [sample.reward for sample in scored]),
        strict_pass_rate=estimate_rate(prompts, [sample.strict_pass for sample in scored]),
        num_failed=len(samples) - len(scored),
    )


def _tag_score(side: str, tag: str, answers: Sequence[QuestionAnswer]) -> TagScore:
    answered = [answer for answer in answers if answer.p_yes is not None]
    prompts = [answer.sample.index for answer in answered]
    return TagScore(
        side=side,
        name=tag,
        p_yes=bootstrap_mean(prompts, [answer.p_yes for answer in answered]),
        pass_rate=estimate_rate(prompts, [answer.passed for answer in answered]),
        num_failed=len(answers) - len(answered),
    )
