# SPDX-License-Identifier: Apache-2.0

"""
Run a recipe's training on a Ray cluster, by Ray Train: `pip install 'alphagrpo-ext[ray]'`.

Without arguments it starts Ray on this machine and trains the packaged `bagel-shapes` in one worker:

```bash
python recipes/ray_train.py
```

Every argument of the recipe works on the command line, and `--config` takes its YAML files. With `--ray_address` it runs on a
cluster that is there (`ray start --head`, and `ray start --address HEAD:6379` on the other nodes), where this package and the
recipe have to be on every node and the output directory on storage that all of them share:

```bash
python recipes/ray_train.py --recipe self_reflection --ray_address auto --num_workers 16 --use_gpu \
    --config recipes/configs/self_reflection_bagel.yaml --output_dir /shared/runs/reflection --save_steps 20
```

Those who come from OpenRLHF bring their flags. `--help` lists what becomes of each; those without a meaning here are refused
with the reason. On two nodes with eight GPUs each, and with a reward server beside them:

```bash
python recipes/ray_train.py --recipe reasoning_t2i --ray_address auto \
    --config recipes/configs/reasoning_t2i_bagel.yaml \
    --actor.model_name_or_path /models/BAGEL-7B-MoT \
    --actor.num_nodes 2 --actor.num_gpus_per_node 8 \
    --actor.adam.lr 5e-5 --actor.max_norm 1.0 --actor.gradient_checkpointing_enable \
    --actor.policy_loss_type gspo --actor.eps_clip_low_high 0.2 0.28 \
    --algo.advantage.estimator group_norm --algo.kl.init_coef 0 \
    --rollout.batch_size 32 --rollout.n_samples_per_prompt 14 --rollout.max_new_tokens 512 \
    --rollout.temperature 1.0 --rollout.top_p 0.8 \
    --train.batch_size 448 --train.micro_batch_size 14 --train.num_episodes 1 --train.seed 42 \
    --ds.lora.rank 32 --ds.lora.alpha 64 --ds.param_dtype bf16 \
    --reward.remote_url http://judge:8001 --data.prompt_dataset /shared/questions.jsonl \
    --ckpt.output_dir /shared/runs/t2i --ckpt.save_steps 20 --ckpt.max_num 3
```

If a worker fails, all of them start again from the last checkpoint in the output directory, `--max_failures` times. What Ray
writes, and `attempts.jsonl` with a line a start, is in a folder of its own there.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from alphagrpo_ext.files import require_extra
from alphagrpo_ext.trainer.resume.checkpoint_folder import (
    asks_for_last,
    asks_to_resume,
    last_checkpoint,
    read_manifest,
)
from recipe_tools.openrlhf_flag_table import FLAGS, FlagError
from recipe_tools.openrlhf_flags import describe_flags, translate_flags


RECIPES = Path(__file__).parent
ATTEMPTS_FILE = "attempts.jsonl"
RAY_ENVIRONMENT = {
    # Ray would send usage statistics.
    "RAY_USAGE_STATS_ENABLED": "0",
    # Imports alone can take a minute on a busy machine.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
    # Workers without a GPU of their own must not see those of others.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}
SECRET_WORDS = ("KEY", "TOKEN", "SECRET", "PASSWORD")


@dataclass
class RayArguments:
    """
    Where and what to run. They stand on the command line; `--config` is the recipe's.

    Args:
        recipe (`str`, *optional*, defaults to `"reasoning_t2i"`):
            A recipe beside this one, or the path of a file whose function `main` takes a `TrainingArguments`.
        num_workers (`int`, *optional*, defaults to `1`):
            Processes that train together.
        use_gpu (`bool`, *optional*, defaults to `False`):
            Whether every worker has a GPU.
        cpus_per_worker (`int`, *optional*, defaults to `1`):
            CPUs that a worker reserves.
        ray_address (`str`, *optional*):
            Cluster to run on, e.g. `"auto"` or `"host:6379"`. `None` takes that of the environment variable `RAY_ADDRESS`, or
            else starts Ray on this machine.
        max_failures (`int`, *optional*, defaults to `3`):
            How often the workers are started again after one of them failed.
        include_dashboard (`bool`, *optional*, defaults to `False`):
            Whether Ray, if it is started, opens its dashboard.
        environment (`list[str]`, *optional*):
            Environment variables of every worker, as `NAME=VALUE`. Not for keys.

    Raises:
        `ValueError`: If a value is out of range.
    """

    recipe: str = field(
        default="reasoning_t2i", metadata={"help": "A recipe beside this one, or the path of one of your own."}
    )
    num_workers: int = field(default=1, metadata={"help": "Processes that train together."})
    use_gpu: bool = field(default=False, metadata={"help": "Whether every worker has a GPU."})
    cpus_per_worker: int = field(default=1, metadata={"help": "CPUs that a worker reserves."})
    ray_address: str | None = field(
        default=None,
        metadata={"help": "Cluster to run on, e.g. 'auto' or 'host:6379'; without it Ray is started on this machine."},
    )
    max_failures: int = field(
        default=3, metadata={"help": "How often the workers are started again after one of them failed."}
    )
    include_dashboard: bool = field(
        default=False, metadata={"help": "Whether Ray, if it is started, opens its dashboard."}
    )
    environment: list[str] = field(
        default_factory=list,
        metadata={"help": "Environment variables of every worker, as NAME=VALUE; not for keys."},
    )

    def __post_init__(self) -> None:
        for name, least in (("num_workers", 1), ("cpus_per_worker", 1), ("max_failures", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}")
        for entry in self.environment:
            name, equals, _ = entry.partition("=")
            if not name or not equals:
                raise ValueError(f"environment takes NAME=VALUE, but got {name!r} without a value")
            if any(word in name.upper() for word in SECRET_WORDS):
                raise ValueError(
                    f"environment must not hold {name}: command lines are seen by others, so set it where the workers run"
                )

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """What a worker reserves, in Ray's terms."""
        return {"CPU": self.cpus_per_worker, **({"GPU": 1} if self.use_gpu else {})}


@dataclass(frozen=True)
class Job:
    """
    What every worker is told.

    Args:
        recipe (`str`): Path of the recipe, relative to `directory` if it lies there.
        arguments (`list[str]`): The recipe's command line.
        directory (`str`): Where the run was started; relative paths count from there.
        output_dir (`str`): Absolute.
        run_dir (`str`): Folder of Ray's files and of `attempts.jsonl`.
        resume_from (`str`, *optional*): Checkpoint to go on from if the output directory has none.
        environment (`dict[str, str]`): Environment variables.
    """

    recipe: str
    arguments: list[str]
    directory: str
    output_dir: str
    run_dir: str
    resume_from: str | None
    environment: dict[str, str]


def find_recipe(name: str) -> Path:
    """
    Path of a recipe.

    Raises:
        `ValueError`: If there is none; the message lists those that exist.
    """
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file() or path.resolve() == Path(__file__).resolve():
        names = sorted(p.stem for p in RECIPES.glob("*.py") if "training_args: " in p.read_text(encoding="utf-8"))
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"there is no recipe {name!r}: {hint}There are {', '.join(names)}, and the path of any file")
    return path


def load_recipe(path: Path) -> ModuleType:
    """
    Import a recipe by its path.

    Raises:
        `ValueError`: If its `main` does not take a `TrainingArguments`, so that it is none that trains.
    """
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    # Annotations of its dataclasses are looked up by the name of their module.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if not any(issubclass(kind, TrainingArguments) for kind in argument_types(module)):
        raise ValueError(f"{path} does not train: its main must take an AlphaGRPOConfig or another TrainingArguments")
    return module


def argument_types(recipe: ModuleType) -> list[type]:
    """Dataclasses that a recipe's `main` takes, in their order."""
    hints = get_type_hints(recipe.main)
    hints.pop("return", None)
    return list(hints.values())


def make_parser(types: Sequence[type]) -> TrlParser:
    """A parser that takes no abbreviations, which could be taken for something else."""
    return TrlParser(types, allow_abbrev=False)


def with_config(recipe: ModuleType, arguments: Sequence[str]) -> list[str]:
    """The recipe's command line, with its own configuration if none is named."""
    default = getattr(recipe, "DEFAULT_CONFIG", None)
    return list(arguments) if "--config" in arguments or default is None else ["--config", str(default), *arguments]


def read_settings(recipe: ModuleType, arguments: Sequence[str]) -> argparse.Namespace:
    """
    Check names and types of a recipe's arguments. What they mean together depends on the number of processes, so that only
    the workers can tell.

    Raises:
        [`FlagError`]: If an argument is unknown.
    """
    parser = make_parser(argument_types(recipe))
    rest = with_config(recipe, arguments)
    unknown = []
    if "--config" in rest:
        index = rest.index("--config")
        if index + 1 == len(rest):
            raise ValueError("--config takes the path of a YAML file")
        config = yaml.safe_load(Path(rest[index + 1]).read_text(encoding="utf-8"))
        config.pop("env", None)
        unknown = [part for part in parser.set_defaults_with_config(**config) if part.startswith("--")]
        del rest[index : index + 2]
    settings, others = parser.parse_known_args(rest)
    unknown += others
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        known += [f"--{name}" for name in (*(each.name for each in fields(RayArguments)), *FLAGS)]
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists what there is"
        raise FlagError(f"unknown argument {unknown[0]}: {hint}")
    return settings


def check_output_dir(output_dir: Path, resume_from: str | None) -> str | None:
    """
    Checkpoint to begin with, `None` for a run from the start.

    Args:
        output_dir (`Path`): Of the run.
        resume_from (`str`, *optional*): `"last"` for the last complete checkpoint there, if there is one, or a path.

    Raises:
        `ValueError`: If the output directory has a checkpoint that the run is not to go on from; a restart would take it.
        `DamagedCheckpointError`: If the checkpoint that is named is not complete, or not there.
    """
    last = last_checkpoint(output_dir)
    if not asks_to_resume(resume_from):
        if last is not None:
            raise ValueError(
                f"{output_dir} holds {last.name} of an earlier run: go on from it with --resume_from_checkpoint last "
                "(--ckpt.load_enable), or name another --output_dir"
            )
        return None
    if asks_for_last(resume_from):
        return last and str(last)
    checkpoint = Path(resume_from).resolve()
    read_manifest(checkpoint)
    if last is not None and last.resolve() != checkpoint:
        raise ValueError(
            f"{output_dir} holds {last.name}, from which a restart would go on: name another --output_dir to go on from "
            f"{checkpoint}"
        )
    return str(checkpoint)


def train_worker(config: Mapping[str, Any]) -> None:
    """
    Train, as one of the workers: what Ray runs, again from the last checkpoint after a failure.

    Args:
        config (`Mapping[str, Any]`): Fields of a [`Job`].
    """
    import ray.train

    job = Job(**config)
    if not Path(job.run_dir).is_dir():
        raise FileNotFoundError(
            f"{job.run_dir} is not there on this node: output_dir must be on storage that all nodes share"
        )
    os.environ.update(job.environment)
    # On a cluster with a copy of the working directory for each node, the worker is in its copy as it is.
    if Path(job.directory).is_dir():
        os.chdir(job.directory)
    recipe = load_recipe(Path(job.recipe))
    last = last_checkpoint(job.output_dir)
    checkpoint = str(last) if last is not None else job.resume_from
    if ray.train.get_context().get_world_rank() == 0:
        with (Path(job.run_dir) / ATTEMPTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": time.time(), "resumed_from": checkpoint}) + "\n")
    arguments = [*with_config(recipe, job.arguments), "--output_dir", job.output_dir]
    parsed = make_parser(argument_types(recipe)).parse_args_and_config(arguments, fail_with_unknown_args=True)
    (training_args,) = [part for part in parsed if isinstance(part, TrainingArguments)]
    num_workers = ray.train.get_context().get_world_size()
    if training_args.world_size != num_workers:
        raise RuntimeError(
            f"accelerate sees {training_args.world_size} of {num_workers} workers, so that each would train alone: is a variable "
            "of accelerate (ACCELERATE_...) set on this node?"
        )
    training_args.resume_from_checkpoint = checkpoint
    recipe.main(*parsed)


def quiet_cleaner() -> None:
    """In every process of Ray: the part that looks after orphans asks the dashboard, and complains every second without."""
    cleaner = "ray.train.v2._internal.execution.controller.placement_group_cleaner"
    logging.getLogger(cleaner).setLevel(logging.ERROR)


def start_ray(args: RayArguments) -> None:
    """
    Connect to a cluster, or start Ray on this machine.

    Raises:
        `RuntimeError`: If this machine has not what the workers need.
    """
    # Before the import, which reads them.
    for name, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    needed = {name: amount * args.num_workers for name, amount in args.resources_per_worker.items()}
    address = args.ray_address or os.environ.get("RAY_ADDRESS")
    if address:
        ray.init(address=address)
    else:
        with warnings.catch_warnings():
            # About the default of what is set above.
            warnings.filterwarnings("ignore", message="Tip: In future versions of Ray", category=FutureWarning)
            ray.init(
                address="local",
                # Logical CPUs, so that a small machine can try out many workers.
                num_cpus=max(os.cpu_count() or 1, needed["CPU"]),
                include_dashboard=args.include_dashboard,
                runtime_env=None if args.include_dashboard else {"worker_process_setup_hook": quiet_cleaner},
            )
    available = ray.cluster_resources()
    missing = {name: amount for name, amount in needed.items() if available.get(name, 0) < amount}
    if missing and not address:
        raise RuntimeError(
            f"{args.num_workers} workers need {missing}, but this machine has "
            f"{ {name: available.get(name, 0) for name in missing} }: lower --num_workers, or name a cluster with --ray_address"
        )
    if missing:
        print(f"The cluster has {available} so far, and the workers wait until it has {needed}.")


def run(args: RayArguments, arguments: Sequence[str]) -> None:
    """
    Train on Ray.

    Args:
        args ([`RayArguments`]): Where.
        arguments (`Sequence[str]`): The recipe's command line.

    Raises:
        `ValueError`: If an argument is unknown or the output directory is another run's.
        `ray.train.TrainingFailedError`: If workers failed more often than they may.
    """
    require_extra("ray", "ray")
    path = find_recipe(args.recipe).resolve()
    recipe = load_recipe(path)
    settings = read_settings(recipe, arguments)
    if not args.use_gpu and not settings.use_cpu:
        # Ray names its device to accelerate, which then lets workers find each other on GPUs alone.
        arguments = [*arguments, "--use_cpu", "true"]
    output_dir = Path(settings.output_dir).resolve()
    resume_from = check_output_dir(output_dir, settings.resume_from_checkpoint)
    run_dir = output_dir / time.strftime("ray_%Y%m%d_%H%M%S")
    run_dir.mkdir(parents=True)
    directory = Path.cwd()
    if args.max_failures and str(getattr(settings.save_strategy, "value", settings.save_strategy)) == "no":
        print("No checkpoints are saved, so that a run that fails starts anew: --save_strategy steps --save_steps N.")
    start_ray(args)

    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    job = Job(
        recipe=str(path.relative_to(directory) if path.is_relative_to(directory) else path),
        arguments=list(arguments),
        directory=str(directory),
        output_dir=str(output_dir),
        run_dir=str(run_dir),
        resume_from=resume_from,
        environment=dict(entry.split("=", 1) for entry in args.environment),
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=asdict(job),
        scaling_config=ScalingConfig(
            num_workers=args.num_workers, use_gpu=args.use_gpu, resources_per_worker=args.resources_per_worker
        ),
        run_config=RunConfig(
            name=run_dir.name,
            storage_path=str(output_dir),
            failure_config=FailureConfig(max_failures=args.max_failures),
        ),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()
    print(describe_attempts(run_dir / ATTEMPTS_FILE, output_dir))


def describe_attempts(path: Path, output_dir: Path) -> str:
    """What happened, in a sentence: how often the workers were started again, and from where."""
    attempts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if len(attempts) == 1:
        return f"Finished without a restart: {output_dir}"
    starts = [Path(entry["resumed_from"]).name if entry["resumed_from"] else "the start" for entry in attempts[1:]]
    return f"Finished after {len(starts)} restart{'s' * (len(starts) > 1)}, from {', '.join(starts)}: {output_dir}"


def main(command_line: Sequence[str]) -> None:
    wants_help = not {"-h", "--help"}.isdisjoint(command_line)
    translation = translate_flags([part for part in command_line if part not in ("-h", "--help")])
    args, arguments = make_parser([RayArguments]).parse_args_into_dataclasses(
        translation.arguments, return_remaining_strings=True, look_for_args_file=False
    )
    if wants_help:
        recipe = load_recipe(find_recipe(args.recipe))
        print(make_parser([RayArguments, *argument_types(recipe)]).format_help())
        print(describe_flags())
        return
    for note in translation.notes:
        print(note)
    run(args, arguments)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except FlagError as error:
        sys.exit(f"{Path(__file__).name}: {error}")
