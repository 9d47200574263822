# SPDX-License-Identifier: Apache-2.0

"""A reward without questions: how likely a model that looks at the image finds the prompt."""
