# SPDX-License-Identifier: Apache-2.0

from support.trainers import make_trainer  # noqa: F401
