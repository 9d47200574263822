# SPDX-License-Identifier: Apache-2.0

"""The model cards of a run: of its output folder and of its checkpoints, from what the trainer knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftModel
from trl import GRPOTrainer

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.adapters import base_name, finish_adapter, is_adapter
from alphagrpo_ext.models.model_card import CardContent, write_model_card
from alphagrpo_ext.trainer.reward_functions import reward_attribute


def save_card(
    trainer: GRPOTrainer, folder: str | Path, dataset_name: str | None = None, tags: str | Iterable[str] | None = None
) -> None:
    """
    Write the model card into a folder of a run, in the process that saves there. The trainer's `card_details`, fields of
    [`~alphagrpo_ext.models.model_card.CardContent`] such as the table of an evaluation, are added to what it says.

    Args:
        trainer ([`AlphaGRPOTrainer`]): The trainer.
        folder (`str` or `Path`): The folder.
        dataset_name (`str`, *optional*): Dataset on the Hub that the model was trained on.
        tags (`str` or `Iterable[str]`, *optional*): Further tags for the Hub.
    """
    if not trainer.args.should_save:
        return
    folder = Path(folder)
    # A checkpoint is moved when it is complete.
    place = Path(trainer.args.output_dir) / folder.name if trainer.resume.is_saving else folder
    place = (
        trainer.args.hub_model_id if trainer.args.hub_model_id and folder == Path(trainer.args.output_dir) else place
    )
    given = [tags] if isinstance(tags, str) else tags or []
    card = replace(run_card(trainer), **trainer.card_details)
    write_model_card(folder, card, place, [*trainer._tag_names, *given], dataset_name)


def complete_folder(trainer: GRPOTrainer, output_dir: str | None) -> None:
    """Make a folder that Transformers or PEFT saved a model to one that says what it holds, and loads on other machines."""
    folder = trainer.args.output_dir if output_dir is None else output_dir
    if trainer.args.should_save:
        if is_adapter(folder):
            finish_adapter(folder)
        save_card(trainer, folder)


def run_card(trainer: GRPOTrainer) -> CardContent:
    """The card of the policy of a trainer, without an evaluation."""
    model, args = trainer.accelerator.unwrap_model(trainer.model), trainer.args
    has_adapter = isinstance(model, PeftModel)
    policy = model.get_base_model() if has_adapter else model
    base_model, license = base_name(policy)
    task = trainer.tasks[args.task]
    rounds = args.num_reflection_rounds if task.needs_image and task.can_paint else 0
    own_prompt = _first_prompt(trainer.train_dataset)
    return CardContent(
        base_model=base_model,
        is_adapter=has_adapter,
        task=args.task,
        license=license,
        **({"prompt": own_prompt} if own_prompt else {}),
        call_settings=f", num_rounds={rounds}" if rounds else "",
        facts=_facts(trainer, model),
    )


def _facts(trainer: GRPOTrainer, model: Any) -> dict[str, Any]:
    args, parameters = trainer.args, list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    samples = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "trained": f"{trained:,} of {sum(parameter.numel() for parameter in parameters):,} parameters",
        "rewards": ", ".join(map(_reward, trainer.reward_func_names, trainer.reward_funcs)),
        "steps": f"{trainer.state.global_step}, each of {samples} samples, {args.num_generations} per prompt",
        "learning rate": f"{args.learning_rate:g}",
        "images": f"{args.image_height} x {args.image_width} pixels",
    }


def _reward(name: str, function: Any) -> str:
    run_settings: Mapping[str, Any] = reward_attribute(function, "run_settings", {})
    # Prompts and digests are not for a line of a table.
    settings = {key: value for key, value in run_settings.items() if key != "reward_model"}
    return f"{name} ({', '.join(f'{key}: {value}' for key, value in settings.items())})" if settings else name


def _first_prompt(dataset: Any) -> str | None:
    """The first prompt of a dataset; the rows of a stream are not read for it."""
    if not isinstance(dataset, Dataset) or not len(dataset):
        return None
    return prompt_text(dataset[0]["prompt"])
