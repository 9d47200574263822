# SPDX-License-Identifier: Apache-2.0

"""Evaluation of models in stages, for `evaluate.py`, and what it costs, for `fewer_evaluations.py`."""
