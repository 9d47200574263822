# SPDX-License-Identifier: Apache-2.0

"""
Runs a script as one of several processes on a machine without accelerators, also under FSDP2, which accelerate otherwise
replaces by DDP there without a word.
"""

import os
import runpy
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def allow_fsdp_on_cpu() -> None:
    """To be used with `ACCELERATE_TORCH_DEVICE=cpu`."""

    def prepare_backend(self: PartialState, *args: object, **kwargs: object) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare_backend


def do_not_compile_deepspeed() -> None:
    """DeepSpeed would first compile collectives in shared memory, which needs a C++ compiler and a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        do_not_compile_deepspeed()
    script = sys.argv[1]
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(script).parent)
    runpy.run_path(script, run_name="__main__")
