# SPDX-License-Identifier: Apache-2.0

"""
Digests of the weights after three training steps, to check that a change of the code leaves training bit-equal.

Run it in two checkouts, on one machine, and compare what it prints:

```bash
python tests/support/weight_digests.py                        # this checkout
python tests/support/weight_digests.py --tree ../before       # another one
```
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors import safe_open


COMMON = (
    *("--max_steps", "3", "--seed", "7", "--bf16", "false", "--eval_seeds", "0", "--report", "false"),
    *("--num_train_prompts", "64", "--per_device_train_batch_size", "16", "--logging_steps", "1"),
)
GUIDED = ("--cfg_text_scale", "2.0", "--cfg_img_scale", "1.5", "--cfg_interval", "0.0", "1.0")
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "reasoning_t2i": ("reasoning_t2i", ("--image_beta", "0.1", "--beta", "0.01", "--num_iterations", "2")),
    "self_reflection": (
        "self_reflection",
        (
            "--num_reflection_rounds",
            "2",
            "--formats",
            "shapes_reflection",
            "--text_loss_weight",
            "1",
            "--cfg_renorm_type",
            "text_channel",
            *GUIDED,
        ),
    ),
    "lora": (
        "reasoning_t2i",
        ("--use_peft", "--lora_r", "8", "--image_beta", "0.1", "--image_steps_per_forward", "2", *GUIDED),
    ),
    "two_processes": (
        "self_reflection",
        ("--train_tasks", "self_reflection", "reasoning_t2i", "--per_device_train_batch_size", "16"),
    ),
}


def weight_digest(folder: Path) -> str:
    """SHA-256 of all tensors in the `.safetensors` files of a folder, by name, type, shape and bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name).contiguous()
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.view(-1).numpy().tobytes())
    return digest.hexdigest()


def train(tree: Path, name: str, output_dir: Path) -> None:
    """Run one of [`RUNS`] with the recipes and packages of a checkout."""
    recipe, options = RUNS[name]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    if name == "two_processes":
        launcher += ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [*launcher, f"recipes/{recipe}.py", *COMMON, *options, "--output_dir", str(output_dir)]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if run.returncode:
        sys.exit(f"{name} failed:\n{run.stdout[-2000:]}\n{run.stderr[-6000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[2], help="Checkout to run.")
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS), help="Which runs; all by default.")
    arguments = parser.parse_args()
    for name in arguments.runs:
        with tempfile.TemporaryDirectory() as folder:
            train(arguments.tree.resolve(), name, Path(folder))
            sys.stdout.write(f"{name:16} {weight_digest(Path(folder))}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
