# SPDX-License-Identifier: Apache-2.0

"""The report of a run: an HTML page with curves, a gallery of trajectories, and images before and after training."""

from alphagrpo_ext.report.page import write_report
from alphagrpo_ext.report.records import (
    Answer,
    Comparison,
    ImagePair,
    ReportTurn,
    ScoreTable,
    TrajectoryGroup,
    TrajectoryRecord,
)
from alphagrpo_ext.report.store import ReportStore


__all__ = [
    "Answer",
    "Comparison",
    "ImagePair",
    "ReportStore",
    "ReportTurn",
    "ScoreTable",
    "TrajectoryGroup",
    "TrajectoryRecord",
    "write_report",
]
