# SPDX-License-Identifier: Apache-2.0

"""From a prompt to yes/no questions: decomposers, their requests to a language model, and the file of results."""
