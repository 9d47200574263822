# SPDX-License-Identifier: Apache-2.0

"""
Check on one GPU with 80 GB that the package computes there what it computes on a CPU, and measure how fast it trains.

```bash
python recipes/gpu_check.py
```

It takes at most 9 minutes. What is finished is kept in `gpu_check.json` in `--output_dir`, and the same command goes on from there.
The table is printed and saved as `gpu_check.md`. The exit status is 0 if everything passed, 1 if a bound is exceeded, a part failed or
the time is over, and 2 if there is no such device or an argument is wrong.

Only the parity of tiny models (`--parts parity`), or the speed of one model:

```bash
python recipes/gpu_check.py --parts speed --sizes BAGEL-7B-MoT
```

No weights are downloaded: `bagel-shapes` is packaged, and other models get random weights, which are drawn on the device. Beside a
PyTorch installation it needs the wheels of accelerate, datasets, diffusers, filelock, huggingface_hub, peft, pillow, pydantic,
safetensors, scipy, transformers, trl and xxhash, which are those of this package, and what these depend on.
"""

from __future__ import annotations

import sys
import traceback
from typing import TYPE_CHECKING

from gpu_check_parts.arguments import TINY_SIZES, GPUCheckArguments
from recipe_tools.input_errors import checking_input, input_errors_in_a_line
from recipe_tools.recipe_arguments import RecipeParser


if TYPE_CHECKING:
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
    return device


def environment(device: torch.device) -> dict[str, str]:
    """What results depend on besides arguments."""
    import torch

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"name": name, "torch": torch.__version__}


def run_part(part: str, size: str, device: torch.device, args: GPUCheckArguments) -> PartResult:
    """Run a part for one model. Its error is its result, so that the other parts run."""
    from gpu_check_parts.parity import check_parity
    from gpu_check_parts.results import PartResult, error_table
    from gpu_check_parts.speed import check_speed

    try:
        return check_parity(size, device) if part == "parity" else check_speed(size, device, args)
    except Exception as error:
        traceback.print_exc()
        return PartResult(error_table(f"{part.capitalize()}: {size}", error), passed=False)


def run_parts(file: ResultFile, device: torch.device, args: GPUCheckArguments) -> list[PartResult]:
    """Run what has not passed yet, and return the results of all parts that are asked for."""
    import gc

    import torch

    results = []
    for part in args.parts:
        for size in TINY_SIZES if part == "parity" else args.sizes:
            name = f"{part} {size}"
            known = file.parts.get(name)
            if known is None or not known.passed:
                print(f"{name} ...", file=sys.stderr, flush=True)
                file.add(name, run_part(part, size, device, args))
                # The next model needs the memory of this one.
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
            results.append(file.parts[name])
    return results


def main(args: GPUCheckArguments) -> int:
    # Here, so that `--help` does not import models.
    with checking_input():
        device = find_device(args.device)
    from gpu_check_parts.results import OutOfTimeError, ResultFile, stop_after

    with checking_input():
        file = ResultFile(args, environment(device))
    try:
        with stop_after(args.time_limit):
            passed = all(result.passed for result in run_parts(file, device, args))
        verdict = "everything passed" if passed else "not everything passed"
    except OutOfTimeError:
        passed, verdict = False, "the time is over; the same command goes on from here"
    file.save_markdown()
    print(f"{file.to_markdown()}\n\n{verdict}: {file.path}")
    return 0 if passed else 1


if __name__ == "__main__":
    with input_errors_in_a_line():
        with checking_input():
            (arguments,) = RecipeParser([GPUCheckArguments], __doc__).parse_args_and_config()
        sys.exit(main(arguments))
