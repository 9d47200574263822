# SPDX-License-Identifier: Apache-2.0

"""OpenAI-compatible endpoints: one request with retries, chat completions, structured output."""
