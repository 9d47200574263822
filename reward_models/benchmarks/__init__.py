# SPDX-License-Identifier: Apache-2.0


from .base import BENCHMARKS, Benchmark, BenchmarkPrompt


__all__ = ["BENCHMARKS", "Benchmark", "BenchmarkPrompt"]
