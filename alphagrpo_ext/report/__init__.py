# SPDX-License-Identifier: Apache-2.0

"""The report of a run: an HTML page with images before and after training, trajectories, curves, and the run's settings."""

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
from alphagrpo_ext.report.run_record import RunRecord, describe_run
from alphagrpo_ext.report.store import ReportStore


__all__ = [
    "Answer",
    "Comparison",
    "ImagePair",
    "ReportStore",
    "ReportTurn",
    "RunRecord",
    "ScoreTable",
    "TrajectoryGroup",
    "TrajectoryRecord",
    "describe_run",
    "write_report",
]
