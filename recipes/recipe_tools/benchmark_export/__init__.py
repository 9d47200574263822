# SPDX-License-Identifier: Apache-2.0

"""Images of public benchmarks, for `export_benchmark.py`."""
