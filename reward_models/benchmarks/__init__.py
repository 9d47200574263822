# SPDX-License-Identifier: Apache-2.0

"""Public benchmarks: their prompts, and the folders of images that their scorers read."""

from reward_models.benchmarks.base import BENCHMARKS, Benchmark, BenchmarkPrompt


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkPrompt"]
