# SPDX-License-Identifier: Apache-2.0

"""
Train a unified multimodal model on reasoning text-to-image: prompt, thought, image.

Without arguments it trains the packaged `bagel-shapes` in a few minutes on a laptop and shows what was learned:

```bash
accelerate launch recipes/reasoning_t2i.py
```

A run that was stopped goes on as if it had not been, with the same command and two arguments; so it may have them from
the beginning:

```bash
accelerate launch recipes/reasoning_t2i.py --save_strategy steps --save_steps 10 --resume_from_checkpoint last
```

Every argument of `AlphaGRPOConfig` and `ModelConfig` works on the command line or in a file; what stands on the command
line wins:

```bash
accelerate launch --multi_gpu --num_processes 2 recipes/reasoning_t2i.py \
    --config recipes/configs/reasoning_t2i_shapes.yaml --max_steps 50 --output_dir runs/try
```
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate import PartialState
from trl import ModelConfig, TrlParser, get_peft_config

from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.report import ReportStore, write_report
from alphagrpo_ext.rollout import TASKS, RolloutGenerator
from alphagrpo_ext.trainer import AlphaGRPOConfig, AlphaGRPOTrainer
from alphagrpo_ext.trainer.callbacks.json_lines import JsonLinesCallback
from alphagrpo_ext.trainer.resume.checkpoint_folder import asks_to_resume, resolve_checkpoint
from recipe_tools.contact_sheet import contact_sheet
from reward_models.arguments import PromptArguments
from reward_models.evaluation.evaluate import evaluate
from reward_models.evaluation.page import make_report_comparison
from reward_models.evaluation.samples import Evaluation
from reward_models.evaluation.settings_digest import settings_digest
from reward_models.evaluation.store import evaluate_once
from reward_models.evaluation.text_tables import comparison_table
from reward_models.prompts.loading import load_prompts


DEFAULT_CONFIG = Path(__file__).parent / "configs" / "reasoning_t2i_shapes.yaml"
NUM_PICTURED = 8


def save_picture(before: Evaluation, after: Evaluation, path: Path) -> None:
    """Some prompts of every category with their image before and after training."""
    pairs = list(zip(before.samples, after.samples, strict=True))
    pairs = [pair for pair in pairs if None not in (pair[0].reward, pair[1].reward)]
    chosen = []
    for category in before.categories:
        of_category = [pair for pair in pairs if pair[0].category == category]
        chosen += of_category[: max(1, NUM_PICTURED // len(before.categories))]
    rows = [
        (old.prompt, [(old.image, f"reward {old.reward:.2f}"), (new.image, f"reward {new.reward:.2f}")])
        for old, new in chosen
    ]
    contact_sheet(rows, headers=("before", "after")).save(path)


def main(script_args: PromptArguments, training_args: AlphaGRPOConfig, model_args: ModelConfig) -> None:
    output_dir = Path(training_args.output_dir)
    resuming = asks_to_resume(training_args.resume_from_checkpoint)
    # A checkpoint that cannot be resumed is found before anything is loaded.
    checkpoint = resolve_checkpoint(training_args.resume_from_checkpoint, output_dir)
    train_dataset = load_prompts(script_args.train_file, "train", script_args.num_train_prompts)
    # A list of rows decodes images, where `to_list` would not.
    eval_rows = list(load_prompts(script_args.eval_file, "evaluation", script_args.num_eval_prompts))
    model, processor = load_model(
        model_args.model_name_or_path,
        dtype=model_args.dtype,
        **({"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}),
    )
    reward = script_args.make_reward((model, processor))
    # PEFT's causal language models have a `generate` of their own, which this policy has not.
    model_args.lora_task_type = None
    preset = model.family.lora_target_modules(training_args.lora_targets)
    model_args.lora_target_modules = model_args.lora_target_modules or preset
    trainer = AlphaGRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=training_args,
        train_dataset=train_dataset,
        processing_class=processor,
        peft_config=get_peft_config(model_args),
        callbacks=[
            JsonLinesCallback(output_dir / "metrics.jsonl"),
            *script_args.make_holdout_callbacks(script_args.aggregation, (model, processor)),
        ],
    )

    def run_evaluation(description: str) -> Evaluation | None:
        if not script_args.eval_seeds:
            return None
        task = TASKS.get(training_args.task)(think=training_args.think)
        with trainer.gathered_policy() as policy:
            return evaluate(
                RolloutGenerator(policy, processor, task),
                eval_rows,
                training_args.eval_rollout(),
                reward,
                seeds=range(script_args.eval_seeds),
                batch_size=script_args.eval_batch_size,
                description=description,
            )

    before = None
    if script_args.eval_seeds:
        settings = settings_digest(
            *(model_args.model_name_or_path, model_args.dtype, script_args, eval_rows),
            *(training_args.eval_rollout(), training_args.task, training_args.think),
        )
        (before,) = evaluate_once(
            output_dir / "before_training", settings, resuming, lambda: [run_evaluation("before training")]
        )
    trainer.train(resume_from_checkpoint=checkpoint)
    after = run_evaluation("after training")
    trainer.save_model(output_dir)
    if before is None or not PartialState().is_main_process:
        return
    summary = {"before": before.summary(), "after": after.summary()}
    temporary = output_dir / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2) + "\n")
    os.replace(temporary, output_dir / "summary.json")
    if training_args.report:
        ReportStore(output_dir).save_comparison(
            make_report_comparison(before, after, max_image_size=training_args.report_image_size)
        )
        write_report(output_dir)
    save_picture(before, after, output_dir / "before_after.png")
    print(
        f"\n{comparison_table(before, after)}\n\nModel, report.html, summary.json, metrics.jsonl and before_after.png: {output_dir}"
    )


if __name__ == "__main__":
    arguments = sys.argv[1:] if "--config" in sys.argv else ["--config", str(DEFAULT_CONFIG), *sys.argv[1:]]
    parser = TrlParser((PromptArguments, AlphaGRPOConfig, ModelConfig))
    main(*parser.parse_args_and_config(arguments, fail_with_unknown_args=True))
    # Threads of the communication backend that outlive the interpreter may abort the process.
    PartialState().destroy_process_group()
