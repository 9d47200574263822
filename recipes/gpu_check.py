# SPDX-License-Identifier: Apache-2.0

"""
Check on one GPU with 80 GB that the package computes there what it computes on a CPU, and measure how fast it trains.

```bash
python recipes/gpu_check.py
```

It takes at most 9 minutes, of which every part has a share. What is finished is kept in `gpu_check.json` in `--output_dir`, and the
same command goes on from there. The tables are printed and saved as `gpu_check.md`. The exit status is 0 if everything passed, 1 if a
bound is exceeded, a part failed or its time was over, and 2 if there is no such device or an argument is wrong.

The parts are `parity` of tiny models with the CPU, `speed` of rollouts and updates, and which ways to compute are the fastest: of a
`denoising` step (eager mode, compiled layers, CUDA graphs) and of an `update` (attentions, compiled layers). One of them for one model:

```bash
python recipes/gpu_check.py --parts denoising --sizes BAGEL-7B-MoT
```

No weights are downloaded: `bagel-shapes` is packaged, and other models get random weights, which are drawn on the device. Beside a
PyTorch installation it needs the wheels of accelerate, datasets, diffusers, filelock, huggingface_hub, peft, pillow, pydantic,
safetensors, scipy, transformers, trl and xxhash, which are those of this package, and what these depend on.
"""

from __future__ import annotations

import sys
import time
import traceback
from dataclasses import replace
from typing import TYPE_CHECKING

from gpu_check_parts.arguments import CHECK_PARTS, TINY_SIZES, GPUCheckArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from gpu_check_parts.results import PartResult, ResultFile


def find_device(name: str) -> torch.device:
    """
    The device of this name.

    Raises:
        `ValueError`: If PyTorch finds no such device.
    """
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: {name!r} is no device of PyTorch") from error
    if device.type == "cpu":
        return device
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.type or (device.index or 0) >= torch.accelerator.device_count():
        raise ValueError(f"device: PyTorch {torch.__version__} finds no {name}, so there is nothing to check")
    # Streams, graphs and generated kernels are those of the current device.
    torch.accelerator.set_device_index(device.index or 0)
    return device


def environment(device: torch.device) -> dict[str, str]:
    """What results depend on besides arguments."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"name": name, "torch": torch.__version__}


def part_results(part: str, size: str, device: torch.device, args: GPUCheckArguments) -> Iterator[PartResult]:
    """Run a part for one model. Every result has what is known by then."""
    from gpu_check_parts.compilation import check_denoising, check_update
    from gpu_check_parts.parity import check_parity
    from gpu_check_parts.speed import check_speed

    if part == "parity":
        return check_parity(size, device)
    checks = {"speed": check_speed, "denoising": check_denoising, "update": check_update}
    return checks[part](size, device, args)


def run_part(
    file: ResultFile, part: str, size: str, device: torch.device, args: GPUCheckArguments, seconds: float
) -> None:
    """Run a part for one model, and keep its results. An error or the end of its time is its result, so that other parts run."""
    from gpu_check_parts.results import OutOfTimeError, short_message, stop_after, unfinished

    name, last = f"{part} {size}", None
    print(f"{name}: {seconds:.0f} s at most ...", file=sys.stderr, flush=True)
    try:
        with stop_after(seconds):
            for last in part_results(part, size, device, args):
                # Nothing has passed that may have more rows.
                file.add(name, replace(last, passed=False))
    except OutOfTimeError:
        reason = f"its {seconds:.0f} s were over"
    except Exception as error:
        traceback.print_exc()
        reason = short_message(error)
    else:
        file.add(name, last)
        return
    file.add(name, unfinished(f"{part.capitalize()}: {size}", last, reason))


def run_parts(file: ResultFile, device: torch.device, args: GPUCheckArguments) -> bool:
    """Run what has not passed yet, each part in its share of the time that is left. Returns whether all has passed by now."""
    from gpu_check_parts.candidates import release_memory

    parts = [(part, size) for part in args.parts for size in (TINY_SIZES if part == "parity" else args.sizes)]
    waiting = [(part, size) for part, size in parts if not file.has_passed(f"{part} {size}")]
    end = time.monotonic() + args.time_limit
    for i, (part, size) in enumerate(waiting):
        shares = [CHECK_PARTS[name] for name, _ in waiting[i:]]
        run_part(file, part, size, device, args, (end - time.monotonic()) * shares[0] / sum(shares))
        # The next model needs the memory of this one.
        release_memory(device)
    return all(file.has_passed(f"{part} {size}") for part, size in parts)


def main(args: GPUCheckArguments) -> int:
    # Here, so that `--help` does not import models.
    with checking_input():
        device = find_device(args.device)
    from alphagrpo_ext.trainer.resume.sole_writer import sole_writer
    from gpu_check_parts.results import ResultFile

    with sole_writer(args.output_dir):
        with checking_input():
            file = ResultFile(args, environment(device))
        passed = run_parts(file, device, args)
        file.save_markdown()
    verdict = "everything passed" if passed else "not everything passed; the same command repeats what has not"
    print(f"{file.to_markdown()}\n\n{verdict}: {file.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([GPUCheckArguments], __doc__).parse_args_and_config()
        sys.exit(main(arguments))
