# SPDX-License-Identifier: Apache-2.0

"""Stage 1 of self-reflection: images that the policy paints to refine them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from accelerate.utils import gather_object
from PIL import Image

from alphagrpo_ext.rollout.generator import RolloutConfig, RolloutGenerator, same_context, sample_generator
from alphagrpo_ext.rollout.task import TASKS
from alphagrpo_ext.trainer.rewards import select_initial, weighted_sum
from alphagrpo_ext.trainer.rows import reward_row


class InitialImagesMixin:
    """Gives a trainer's rollouts the images that groups set out to fix, and notes their rewards."""

    def _with_initial_images(
        self, generate: RolloutGenerator, config: RolloutConfig, seed: int | str, step: int, offset: int
    ) -> list[dict[str, Any]]:
        """
        Stage 1 of self-reflection: give every row of such a task the image that its group sets out to fix.

        Every process paints images for the prompts that it holds; they are scored by the reward functions, and the one to
        fix is chosen among those of all processes. Notes its reward for every row.
        """
        rows = self._rows
        self._initial_rewards = [float("nan")] * len(rows)
        if not any(task.paints_initial_image for task in self._tasks.values()):
            return list(rows)
        refining = [i for i, row in enumerate(rows) if self._tasks[row["task"]].paints_initial_image]
        firsts = {same_context(rows[i]): i for i in reversed(refining)}
        missing = [i for i in sorted(firsts.values()) if rows[i].get("image") is None]
        count = self.args.num_initial_images
        painting = config.deterministic()
        # There is no image yet whose absence could guide.
        guidance = replace(painting.denoising.guidance, image_scale=1.0)
        paint = RolloutGenerator(generate.model, generate.processor, TASKS.get("reasoning_t2i")(think=False))
        painted = paint(
            [rows[i] for i in missing for _ in range(count)],
            [
                sample_generator(f"initial-{seed}", step, (offset + i) * count + j)
                for i in missing
                for j in range(count)
            ],
            replace(painting, denoising=replace(painting.denoising, guidance=guidance)),
        )
        images = [trajectory.final_image for trajectory in painted]
        candidates = [(i, image) for i, image in zip((i for i in missing for _ in range(count)), images, strict=True)]
        candidates += [(i, rows[i]["image"]) for i in firsts.values() if i not in missing]
        rewards = self._score_initial_images(candidates)
        found = gather_object(
            [(same_context(rows[i]), reward, image) for (i, image), reward in zip(candidates, rewards, strict=True)]
        )
        result = list(rows)
        choices: dict[tuple[str, ...], tuple[float | None, Image.Image]] = {}
        for i in refining:
            key = same_context(rows[i])
            if key not in choices:
                of_prompt = [(reward, image) for other, reward, image in found if other == key]
                rng = random.Random(f"{seed}-{step}-{key}")
                index = select_initial([reward for reward, _ in of_prompt], self.args.stage1_selection, rng)
                choices[key] = of_prompt[index]
            reward, image = choices[key]
            result[i] = {**rows[i], "image": image}
            self._initial_rewards[i] = float("nan") if reward is None else reward
        return result

    def _score_initial_images(self, candidates: Sequence[tuple[int, Image.Image]]) -> list[float | None]:
        """Weighted reward of images alone, each with the row it was painted for."""
        # TRL gathers rewards, so all processes score equally many: the rest are blank and not looked at.
        total = max(gather_object([len(candidates)]))
        if not total:
            return []
        blank = Image.new("RGB", (self.args.image_width, self.args.image_height))
        padded = [*candidates, *[(0, blank)] * (total - len(candidates))]
        inputs = [
            {**reward_row(self._rows[i]), "images": image, "texts": [], "trajectory": None} for i, image in padded
        ]
        empty = [[self._tokenizer.eos_token_id]] * total
        prompts = [row["prompt"] for row in inputs]
        completions = ["" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}] for prompt in prompts]
        functions, names = self.reward_funcs, self.reward_func_names
        classes, is_image = self.reward_processing_classes, self._image_functions()
        try:
            # Only what judges images can judge these.
            self.reward_funcs = [f for f, keep in zip(functions, is_image, strict=True) if keep]
            self.reward_func_names = [n for n, keep in zip(names, is_image, strict=True) if keep]
            self.reward_processing_classes = [c for c, keep in zip(classes, is_image, strict=True) if keep]
            rewards = super()._calculate_rewards(inputs, prompts, completions, empty)
        finally:
            self.reward_funcs, self.reward_func_names, self.reward_processing_classes = functions, names, classes
            # What reward functions log is about the images that get a gradient.
            self._pending_metrics.clear()
            self._pending_extra_logs.clear()
        totals = weighted_sum(rewards, self.reward_weights.to(rewards.device)[is_image])
        start = self.accelerator.process_index * total
        local = totals[start : start + len(candidates)].tolist()
        return [None if reward != reward else reward for reward in local]
