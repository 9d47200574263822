# SPDX-License-Identifier: Apache-2.0

"""
The command line of the reward server: DVReward, and optionally a painter, over HTTP.

```bash
python -m reward_models.server --judge openai --judge_base_url http://localhost:8000/v1 --painter policy \\
    --painter_model runs/reasoning_t2i_bagel --image_height 512 --image_width 512
curl -X POST http://localhost:8001/generate -H 'content-type: application/json' -d '{"items": [{"prompt": "a cat"}]}'
```

`--help` lists all arguments. `app.py` describes the routes, the key and the order of the checks, `arguments.py` the limits
and their defaults, and `protocol.py` the messages.
"""

from __future__ import annotations

import asyncio
import logging
import sys

from trl import TrlParser

from alphagrpo_ext.files import require_extra
from reward_models.dvreward import JudgeFailedError
from reward_models.judges import JUDGES
from reward_models.server.arguments import ServerArguments


def configure_logging() -> None:
    """Send one line of JSON per request to standard output, and warnings of all other loggers to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("reward_models.server.request_log")
    requests.setLevel(logging.INFO)
    requests.addHandler(handler)
    requests.propagate = False


def main(args: ServerArguments) -> None:
    """
    Run the server until it is told to stop.

    Raises:
        [`~reward_models.dvreward.JudgeFailedError`]: If the judge does not answer its first question.
    """
    for module in ("fastapi", "prometheus_client", "uvicorn"):
        require_extra(module, "server")
    from reward_models.server.app import create_app
    from reward_models.server.connections import serve

    configure_logging()
    # A judge that takes a model is in this process, so there is nothing to reach.
    reward = args.make_reward() if JUDGES.get(args.judge).is_light else None
    if reward is not None:
        # Without a painter, the size of images is not known.
        size = () if args.painter == "none" else (args.image_height, args.image_width)
        asyncio.run(reward.preflight(*size))
    serve(create_app(args, reward), args)


if __name__ == "__main__":
    (arguments,) = TrlParser((ServerArguments,)).parse_args_and_config()
    try:
        main(arguments)
    except JudgeFailedError as error:
        sys.exit(str(error))
