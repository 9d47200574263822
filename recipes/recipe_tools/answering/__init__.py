# SPDX-License-Identifier: Apache-2.0

"""Questions about images in recipes: rows to train on, the guard of yes and no, and an evaluation of answers."""
