# SPDX-License-Identifier: Apache-2.0

"""A page about a run, for people: curves, a gallery of trajectories, images before and after training."""

from alphagrpo_ext.report.page import write_report
from alphagrpo_ext.report.records import Answer, Comparison, Pair, Table, TrajectoryGroup, TrajectoryRecord, Turn
from alphagrpo_ext.report.store import ReportStore


__all__ = [
    "Answer",
    "Comparison",
    "Pair",
    "ReportStore",
    "Table",
    "TrajectoryGroup",
    "TrajectoryRecord",
    "Turn",
    "write_report",
]
