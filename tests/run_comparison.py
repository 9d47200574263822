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

"""Compares what two runs of one training logged."""

from typing import Any


# What two equal runs differ in.
TIMINGS = ("timing/", "judge/latency", "judge/questions_per_second", "step_time", "runtime", "per_second")


def without_timings(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Logged entries without what depends on how fast the machine was."""
    return [{k: v for k, v in entry.items() if not any(timing in k for timing in TIMINGS)} for entry in entries]
