# SPDX-License-Identifier: Apache-2.0

"""
Run the training of a recipe on a Ray cluster, by Ray Train: `pip install 'alphagrpo-ext[ray]'`.

Without arguments the script starts Ray on this machine and trains the packaged `bagel-shapes` in one worker:

```bash
python recipes/ray_train.py
```

Every argument of the recipe works on the command line, and `--config` takes its YAML files. With `--ray_address` the script uses
a running cluster (`ray start --head`, and `ray start --address HEAD:6379` on the other nodes). This package and the recipe must
then be on every node, and the output directory on storage that all nodes share:

```bash
python recipes/ray_train.py --recipe self_reflection --ray_address auto --num_workers 16 --use_gpu \\
    --config recipes/configs/self_reflection_bagel.yaml --output_dir /shared/runs/reflection --save_steps 20
```

OpenRLHF's dotted flags are accepted, too. `--help` lists what becomes of each; a flag that has no meaning here is refused. On two
nodes with eight GPUs each, and with a reward server beside them:

```bash
python recipes/ray_train.py --recipe reasoning_t2i --ray_address auto \\
    --config recipes/configs/reasoning_t2i_bagel.yaml \\
    --actor.model_name_or_path /models/BAGEL-7B-MoT \\
    --actor.num_nodes 2 --actor.num_gpus_per_node 8 \\
    --actor.adam.lr 5e-5 --actor.max_norm 1.0 --actor.gradient_checkpointing_enable \\
    --actor.policy_loss_type gspo --actor.eps_clip_low_high 0.2 0.28 \\
    --algo.advantage.estimator group_norm --algo.kl.init_coef 0 \\
    --rollout.batch_size 32 --rollout.n_samples_per_prompt 14 --rollout.max_new_tokens 512 \\
    --rollout.temperature 1.0 --rollout.top_p 0.8 \\
    --train.batch_size 448 --train.micro_batch_size 14 --train.num_episodes 1 --train.seed 42 \\
    --ds.lora.rank 32 --ds.lora.alpha 64 --ds.param_dtype bf16 \\
    --reward.remote_url http://judge:8001 --data.prompt_dataset /shared/questions.jsonl \\
    --ckpt.output_dir /shared/runs/t2i --ckpt.save_steps 20 --ckpt.max_num 3
```

If a worker fails, all workers start again from the last checkpoint in the output directory, up to `--max_failures` times. Ray's
files, and `attempts.jsonl` with one line per start, are in a folder of their own in the output directory.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from alphagrpo_ext.files import require_extra
from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt, check_ranges
from recipe_tools.openrlhf.flags import JOINT, RENAMED, SWITCHES, FlagParser, translate_flags
from recipe_tools.openrlhf.joint_flags import FlagError
from recipe_tools.ray_job import ATTEMPTS_FILE, RayJob, choose_initial_checkpoint, describe_attempts, train_worker
from recipe_tools.recipe_arguments import (
    RecipeParser,
    UnknownArgumentError,
    argument_types,
    find_recipe,
    load_recipe,
    make_parser,
    read_settings,
    with_config,
)


RAY_ENVIRONMENT = {
    # No usage statistics are sent.
    "RAY_USAGE_STATS_ENABLED": "0",
    # On a busy machine the imports take a minute.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Workers without a GPU of their own must not see other workers' GPUs.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass
class RayArguments:
    """
    Arguments that say what to run and where. They are given on the command line; `--config` is the recipe's.

    Raises:
        `ValueError`: If a value is out of range. The command line must not hold keys, so such a variable is refused, too.
    """

    recipe: str = field(
        default="reasoning_t2i",
        metadata={"help": "Name of a recipe, or path of a file whose function `main` takes a `TrainingArguments`."},
    )
    num_workers: PositiveInt = field(default=1, metadata={"help": "Number of processes that train together."})
    use_gpu: bool = field(default=False, metadata={"help": "Whether every worker has a GPU."})
    cpus_per_worker: PositiveInt = field(default=1, metadata={"help": "Number of CPUs that each worker reserves."})
    ray_address: str | None = field(
        default=None,
        metadata={
            "help": "Cluster to run on, e.g. 'auto' or 'host:6379'. Default: the variable RAY_ADDRESS, or else this machine."
        },
    )
    max_failures: NonNegativeInt = field(
        default=3, metadata={"help": "How often all workers are started again after one of them failed."}
    )
    include_dashboard: bool = field(
        default=False, metadata={"help": "Whether to open the dashboard of a Ray that is started here."}
    )
    environment: list[str] = field(
        default_factory=list,
        metadata={"help": "Environment variables of every worker, as NAME=VALUE. Keys are refused."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        for entry in self.environment:
            name, equals, _ = entry.partition("=")
            if not name or not equals:
                raise ValueError(f"environment takes NAME=VALUE, but got {name!r} without a value")
            if any(word in name.upper() for word in SECRET_WORDS):
                raise ValueError(
                    f"environment must not hold {name}: command lines are visible to others, so set it where the workers run"
                )

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """Resources that each worker reserves, by Ray's names."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.use_gpu else {})}


def silence_cleaner() -> None:
    """Silence Ray's placement group cleaner, which complains every second when there is no dashboard to ask."""
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


def start_ray(args: RayArguments) -> None:
    """
    Connect to a cluster, or start Ray on this machine.

    Raises:
        `RuntimeError`: If this machine does not have the resources that the workers need.
    """
    # Before the import, which reads the variables.
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    needed = {name: amount * args.num_workers for name, amount in args.resources_per_worker.items()}
    address = args.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address)
    else:
        with warnings.catch_warnings():
            # A hint at the default of a variable that is set above.
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
            ray.init(
                address="local",
                # Logical CPUs, so that a small machine can try out many workers.
                num_cpus=max(os.cpu_count() or 1, needed["CPU"]),
                include_dashboard=args.include_dashboard,
                runtime_env=None if args.include_dashboard else {"worker_process_setup_hook": silence_cleaner},
            )
    available = ray.cluster_resources()
    missing = {name: amount for name, amount in needed.items() if available.get(name, 0) < amount}
    if missing and not address:
        raise RuntimeError(
            f"{args.num_workers} workers need {missing}, but this machine has "
            f"{ {name: available.get(name, 0) for name in missing} }: lower --num_workers, or name a cluster with --ray_address"
        )
    if missing:
        print(f"The cluster has {available} so far. The workers wait until it has {needed}.")


def prepare_job(args: RayArguments, arguments: Sequence[str]) -> RayJob:
    """
    Check the recipe, its arguments and its output directory, and create the folder of the run.

    Args:
        args ([`RayArguments`]): Which recipe to run, and where.
        arguments (`Sequence[str]`): The recipe's command line.

    Raises:
        `ValueError`: If an argument is unknown or the output directory belongs to another run.
    """
    path, directory = find_recipe(args.recipe).resolve(), Path.cwd()
    other_names = [*(argument.name for argument in fields(RayArguments)), *RENAMED, *SWITCHES, *JOINT]
    settings = read_settings(load_recipe(path), arguments, other_names)
    if not args.use_gpu and not settings.use_cpu:
        # Ray tells Accelerate which device to use, and Accelerate then looks for other processes on GPUs only.
        arguments = [*arguments, "--use_cpu", "true"]
    output_dir = Path(settings.output_dir).resolve()
    initial_checkpoint = choose_initial_checkpoint(output_dir, settings.resume_from_checkpoint)
    run_dir = output_dir / time.strftime("ray_%Y%m%d_%H%M%S")
    run_dir.mkdir(parents=True)
    if args.max_failures and str(getattr(settings.save_strategy, "value", settings.save_strategy)) == "no":
        print(
            "No checkpoints are saved, so a failed run starts from the beginning: --save_strategy steps --save_steps N."
        )
    return RayJob(
        recipe=str(path.relative_to(directory) if path.is_relative_to(directory) else path),
        arguments=list(arguments),
        directory=str(directory),
        output_dir=str(output_dir),
        run_dir=str(run_dir),
        initial_checkpoint=initial_checkpoint,
        environment=dict(entry.split("=", 1) for entry in args.environment),
    )


def run_job(args: RayArguments, job: RayJob) -> None:
    """
    Train on Ray.

    Raises:
        `ray.train.TrainingFailedError`: If workers failed more than `max_failures` times.
    """
    start_ray(args)
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=args.num_workers, use_gpu=args.use_gpu, resources_per_worker=args.resources_per_worker
        ),
        run_config=RunConfig(
            name=Path(job.run_dir).name,
            storage_path=job.output_dir,
            failure_config=FailureConfig(max_failures=args.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()


def main(command_line: Sequence[str]) -> None:
    asked = {"-h", "--help", "--help_all", "--help-all"}
    wants_help = not asked.isdisjoint(command_line)
    translated, notes = translate_flags([part for part in command_line if part not in asked])
    args, arguments = make_parser([RayArguments]).parse_args_into_dataclasses(
        translated, return_remaining_strings=True, look_for_args_file=False
    )
    if wants_help:
        recipe = load_recipe(find_recipe(args.recipe))
        parser = RecipeParser([RayArguments, *argument_types(recipe)], __doc__)
        line = with_config(recipe, arguments)
        if "--config" in line:
            parser.show_config(line[line.index("--config") + 1])
        # All means all: "--help" ends with the name of the option that shows the rest.
        print(parser.format_help() if {"-h", "--help"} & set(command_line) else parser.format_all())
        print(FlagParser().format_help())
        return
    for note in notes:
        print(note)
    require_extra("ray", "ray")
    job = prepare_job(args, arguments)
    run_job(args, job)
    print(describe_attempts(Path(job.run_dir) / ATTEMPTS_FILE, Path(job.output_dir)))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (FlagError, UnknownArgumentError) as error:
        sys.exit(f"{Path(__file__).name}: {error}")
