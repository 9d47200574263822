# SPDX-License-Identifier: Apache-2.0

from support.reward_server import (  # noqa: F401
    clean_environment,
    example,
    free_port,
    load_file,
    make_server,
    server,
)
