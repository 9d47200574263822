# SPDX-License-Identifier: Apache-2.0

"""The measured tables of the READMEs: which runs each needs, and how their files become its rows."""
