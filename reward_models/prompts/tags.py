# SPDX-License-Identifier: Apache-2.0

"""Tags of questions: those that are known, and what a tag of one's own may be."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field


logger = logging.getLogger(__name__)

SEMANTIC_TAGS = (
    "Style",
    "Environment",
    "Viewpoint",
    "Existence",
    "Count",
    "Attribute",
    "Action",
    "Spatial",
    "Text",
    "Negative",
)
QUALITY_TAGS = ("Geometry", "Anatomy", "Texture", "Coherence", "Lighting", "Physics", "Legibility", "Aesthetics")
TAGS = {"semantic_questions": SEMANTIC_TAGS, "quality_questions": QUALITY_TAGS}
"""The known tags by the field of a row that holds their questions. [`read_tag`] takes others, too."""

MAX_TAG_LENGTH = 40
"""Largest number of characters of a tag, which is part of the name of a metric."""
MAX_OWN_TAGS = 64
"""Largest number of different tags beside the known ones, in a file or a run."""

# A tag that is as similar as this to a known one is a misspelling: two letters swapped in a word of seven.
_MISSPELLING = 0.85
# One that is as similar as this may be one: two letters swapped in a word of four.
_SIMILARITY = 0.75
_warned: set[tuple[str, str]] = set()


def describe_tags() -> str:
    """The known tags in a sentence, for help texts."""
    return (
        f"Known tags of semantic questions: {', '.join(SEMANTIC_TAGS)}; of quality questions: {', '.join(QUALITY_TAGS)}. "
        f"Others are logged as they are."
    )


def match_tag(tags: Iterable[str], tag: str) -> str:
    """The tag in its own spelling, if it differs from one of `tags` in case or surrounding blanks only."""
    return next((known for known in tags if known.casefold() == tag.strip().casefold()), tag)


def read_tag(side: str, tag: str, where: str) -> str:
    """
    Read the tag of a question.

    Args:
        side (`str`): `"semantic_questions"` or `"quality_questions"`.
        tag (`str`): A known tag of that side in any case, or a tag of one's own.
        where (`str`): Name of the question for error messages.

    Returns:
        `str`: A known tag in its own spelling, or another one as it is, without surrounding blanks.

    Raises:
        `ValueError`: If the tag is blank, has more than [`MAX_TAG_LENGTH`] characters, holds line breaks or other characters
            that are not printed, or is a misspelling of a known tag.
    """
    tag = match_tag(TAGS[side], tag).strip()
    advice = f"give it a short name on one line, such as {', '.join(TAGS[side])}, or one of your own"
    if not tag:
        raise ValueError(f"{where}: 'tag' is blank: {advice}")
    if len(tag) > MAX_TAG_LENGTH:
        raise ValueError(
            f"{where}: 'tag' has {len(tag)} characters, more than {MAX_TAG_LENGTH}: {tag[:MAX_TAG_LENGTH]!r}...; {advice}"
        )
    if not tag.isprintable():
        raise ValueError(f"{where}: 'tag' holds a character that is not printed: {tag!r}; {advice}")
    if tag not in TAGS[side] and (meant := _closest(side, tag, _MISSPELLING)):
        raise ValueError(
            f"{where}: unknown tag {tag!r}. Did you mean {meant}? A tag of your own has to differ from it by more"
        )
    return tag


@dataclass
class OwnTags:
    """
    The tags of a file or a run that are not known ones. Each becomes a metric, so there may be only few. One that looks like a
    known tag is warned of, once per run.

    Args:
        found (`set[tuple[str, str]]`, *optional*): Those found so far, each with the field of its questions.
    """

    found: set[tuple[str, str]] = field(default_factory=set)

    def add(self, tags: Iterable[tuple[str, str]], where: str) -> None:
        """
        Add the tags of a row that are not known ones.

        Args:
            tags (`Iterable[tuple[str, str]]`): Field and tag of each question.
            where (`str`): Name of the row for warnings.

        Raises:
            `ValueError`: If there are more than [`MAX_OWN_TAGS`] different ones now.
        """
        for side, tag in tags:
            if tag in TAGS[side] or (side, tag) in self.found:
                continue
            if len(self.found) == MAX_OWN_TAGS:
                raise ValueError(
                    f"the tag {tag!r} in {side} is one more than the {MAX_OWN_TAGS} different ones that there may be beside "
                    f"the known ones: each becomes a metric, so give questions about one topic the same tag"
                )
            self.found.add((side, tag))
            if (side, tag) not in _warned and (hint := _hint(side, tag)):
                _warned.add((side, tag))
                # All processes of a run read the same files.
                if os.environ.get("RANK", "0") == "0":
                    logger.warning("%s: %s", where, hint)


def _hint(side: str, tag: str) -> str | None:
    """What a tag that is not a known one of its side may be meant to be; `None` if it looks like no known one."""
    for other, known in TAGS.items():
        if match_tag(known, tag) in known:
            return f"{tag!r} in {side} is a known tag of {other}, and is logged as a tag of your own. Did you mean {other}?"
    meant = _closest(side, tag, _SIMILARITY)
    return (
        None
        if meant is None
        else f"{tag!r} in {side} is not a known tag, and is logged as it is. Did you mean {meant}?"
    )


def _closest(side: str, tag: str, similarity: float) -> str | None:
    """The known tag of a side that is most similar to a tag, in any case; `None` if none is similar enough."""
    by_folded = {known.casefold(): known for known in TAGS[side]}
    close = difflib.get_close_matches(tag.casefold(), by_folded, n=1, cutoff=similarity)
    return by_folded[close[0]] if close else None
