# SPDX-License-Identifier: Apache-2.0

"""OpenAI-compatible endpoints: requests with retries, chat completions, and answers that fit a pydantic model."""
