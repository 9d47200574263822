# SPDX-License-Identifier: Apache-2.0

"""Sampling with BAGEL: prefill a context once a group, decode text, predict velocities from the cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from alphagrpo_ext.models.bagel.cache import BagelCache, ForkedCache
from alphagrpo_ext.models.bagel.layout import (
    PADDING_BLOCK,
    BagelRow,
    collate_rows,
    grid_position_ids,
    visibility_mask,
)
from alphagrpo_ext.models.bagel.prefill import plan_prefill
from alphagrpo_ext.models.contract import SampledText
from alphagrpo_ext.models.token_sampling import sample_tokens
from alphagrpo_ext.trajectory import Segment, TextSegment


class BagelGenerationMixin:
    """The sampling half of [`BagelModel`]."""

    @torch.no_grad()
    def prefill(
        self,
        contexts: Sequence[Sequence[Segment]],
        group_size: int = 1,
        capacity: int = 0,
        past: BagelCache | None = None,
    ) -> BagelCache:
        """
        Run contexts, of each only what is not known: neither what another one begins with, nor what `past` holds.

        Args:
            contexts (`Sequence[Sequence[Segment]]`): What the samples of each group see. May be empty.
            group_size (`int`, *optional*, defaults to `1`): Samples that share each context.
            capacity (`int`, *optional*, defaults to `0`): Slots a sample may use after it.
            past ([`BagelCache`], *optional*): Of an earlier turn. It is used up.

        Returns:
            [`BagelCache`] with `len(contexts) * group_size` rows.
        """
        plan = plan_prefill(contexts, [] if past is None or past.segments is None else past.segments, self.config)
        if any(plan.past_blocks):
            inputs = self._to_device(collate_rows(plan.rows, self.config))
            num_places = inputs["blocks"].shape[1]
            cache = past.continued(plan.past_rows, plan.past_blocks, num_places)
            self._extend(cache, plan.rows, inputs)
            cache = cache.as_prefix()
        else:
            cache, _ = self._prefill(plan.rows)
            num_places = cache.prefix_blocks.shape[1]
        if self.work is not None:
            self.work.count("prefill", sum(row.num_tokens for row in plan.rows), len(plan.rows) * num_places)
        cache = cache.select(plan.index, plan.ends).with_slots(group_size, capacity)
        cache.segments = [list(context) for context in contexts for _ in range(group_size)]
        return cache

    @torch.no_grad()
    def prefill_rows(
        self, rows: Sequence[BagelRow], group_size: int = 1, capacity: int = 0
    ) -> tuple[BagelCache, torch.Tensor]:
        """[`prefill`] for rows already laid out; also returns the understanding tokens' hidden states."""
        cache, und = self._prefill(rows)
        return cache.with_slots(group_size, capacity), und

    def _prefill(self, rows: Sequence[BagelRow]) -> tuple[BagelCache, torch.Tensor]:
        inputs = self._to_device(collate_rows(rows, self.config))
        positions, num_blocks = self._ends(rows)
        cache = BagelCache.without_slots(inputs["blocks"], positions, num_blocks)
        und, _ = self._run(inputs, cache, prefill=True)
        return cache, und

    @torch.no_grad()
    def extend(self, cache: BagelCache, rows: Sequence[BagelRow]) -> torch.Tensor:
        """
        Append blocks to the slots of every sample, each laid out from its cache's position.

        Returns:
            `torch.Tensor`: Hidden states of the understanding tokens.
        """
        return self._extend(cache, rows, self._to_device(collate_rows(rows, self.config)))

    def _extend(self, cache: BagelCache, rows: Sequence[BagelRow], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        und, _ = self._run(inputs, cache)
        cache.commit(inputs["blocks"], *self._ends(rows))
        cache.segments = None
        return und

    def _ends(self, rows: Sequence[BagelRow]) -> torch.Tensor:
        """Rotary positions and numbers of blocks after rows, `(2, rows)`."""
        ends = torch.tensor([(row.position, row.num_blocks) for row in rows])
        return ends.T.to(self.language_model.lm_head.weight.device)

    def _run(
        self, inputs: dict[str, torch.Tensor], cache: BagelCache, prefill: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        und, gen = self.embed_rows(inputs)
        mask = visibility_mask(inputs["positions"], inputs["blocks"], inputs["horizons"])
        if not prefill:
            mask = cache.visibility(mask)
        return self.language_model.model(und, gen, inputs["positions"], mask, cache, prefill)

    def _to_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        device = self.language_model.lm_head.weight.device
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    @torch.no_grad()
    def sample_text(
        self,
        cache: BagelCache,
        uniforms: torch.Tensor,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> SampledText:
        """
        Sample one text a row and leave it in the cache, between its delimiters.

        Every sampled token is fed to the network once, to predict the next one; so is the end token, which is supplied
        where the limit cut a text off. No second pass over a finished text is needed.

        Args:
            cache ([`BagelCache`]): Its first `batch` rows are continued; there must be `max_new_tokens + 2` free slots.
            uniforms (`torch.Tensor` of shape `(batch, max_new_tokens)`): The randomness, a row a sample.
            temperature, top_k, top_p: See [`sample_tokens`].
        """
        batch, max_new_tokens = uniforms.shape
        eos = self.config.eos_token_id
        rows = cache.head(batch)
        device = cache.positions.device
        uniforms = uniforms.to(device)
        tokens = torch.full((batch,), self.config.bos_token_id, device=device)
        reading = torch.ones(batch, dtype=torch.bool, device=device)
        sampling = reading.clone()
        sampled, log_probs, counted = [], [], []
        for step in range(max_new_tokens + 2):
            num_steps = step + 1
            last = not bool(sampling.any())
            logits = self._feed(rows, tokens, reading)
            reading = sampling
            if last:
                break
            if step < max_new_tokens:
                tokens, token_log_probs = sample_tokens(logits, uniforms[:, step], temperature, top_k, top_p)
                sampled.append(tokens)
                log_probs.append(token_log_probs)
                counted.append(sampling)
                sampling = sampling & (tokens != eos)
            else:
                tokens = torch.full_like(tokens, eos)
                sampling = torch.zeros_like(sampling)
        cache.length = rows.length
        cache.positions[:batch] = rows.positions
        cache.num_blocks[:batch] += 1
        text = self._collect_text(torch.stack(sampled, 1), torch.stack(log_probs, 1), torch.stack(counted, 1), eos)
        for segments, ids, ended in zip(cache.segments or [], text.token_ids, text.ended, strict=False):
            segments.append(TextSegment(ids, sampled=True, ended=ended))
        if self.work is not None:
            num_delimiters = sum(1 if ended else 2 for ended in text.ended)
            num_tokens = num_delimiters + sum(len(ids) for ids in text.token_ids)
            self.work.count("decode", num_tokens, num_steps * batch, num_steps)
        return text

    def _feed(self, cache: BagelCache, tokens: torch.Tensor, reading: torch.Tensor) -> torch.Tensor:
        """Read one token a row; rows that read no longer leave no trace. Returns next-token logits."""
        und = self.language_model.model.embed_tokens(tokens)[:, None]
        mask = cache.visibility(torch.ones(1, 1, 1, dtype=torch.bool, device=und.device))
        und, _ = self.language_model.model(und, None, cache.positions[:, None], mask, cache)
        blocks = torch.where(reading, cache.num_blocks, PADDING_BLOCK)
        cache.commit(blocks[:, None], cache.positions + reading.long(), cache.num_blocks)
        return self.language_model.lm_head(und[:, 0])

    @staticmethod
    def _collect_text(sampled: torch.Tensor, log_probs: torch.Tensor, counted: torch.Tensor, eos: int) -> SampledText:
        lengths = counted.sum(dim=1).tolist()
        token_ids = [ids[:n] for ids, n in zip(sampled.tolist(), lengths, strict=True)]
        return SampledText(
            token_ids=token_ids,
            log_probs=[values[:n] for values, n in zip(log_probs.tolist(), lengths, strict=True)],
            ended=[bool(ids) and ids[-1] == eos for ids in token_ids],
        )

    @torch.no_grad()
    def predict_velocity(
        self, cache: BagelCache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        """
        Velocity of noised images, given what is in the cache.

        Args:
            cache ([`BagelCache`]): Read in place; only its spare slots are written.
            latents (`torch.Tensor` of shape `(rows, tokens, channels)`):
                One noised image a row of the cache, or the same number of them, one after the other, for each.
            grid (`tuple[int, int]`): Rows and columns of tokens.
            timestep (`torch.Tensor`): Time in [0, 1], one for all rows.

        Returns:
            `torch.Tensor` of shape `(rows, tokens, channels)`.
        """
        num_rows, num_tokens, _ = latents.shape
        forks, rest = divmod(num_rows, cache.num_rows)
        if rest:
            raise ValueError(f"{num_rows} images cannot share {cache.num_rows} rows of a cache evenly")
        cache = cache if forks == 1 else ForkedCache(cache, forks)
        device = latents.device
        ids = torch.tensor([self.config.image_start_token_id, self.config.image_end_token_id], device=device)
        und = self.language_model.model.embed_tokens(ids).expand(num_rows, 2, -1)
        position_ids = grid_position_ids(*grid, self.config.max_latent_size).to(device)
        gen = self.embed_latents(latents, position_ids, self.time_embedder(timestep.reshape(1, 1)))
        positions = cache.positions[:, None].expand(num_rows, num_tokens + 2)
        mask = cache.visibility(torch.ones(1, num_tokens + 2, num_tokens + 2, dtype=torch.bool, device=device))
        _, gen = self.language_model.model(und, gen, positions, mask, cache)
        return self.llm2vae(gen)

    @torch.no_grad()
    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        """
        Logits of the first token of an answer, as in BAGEL's understanding mode: image, question, answer.

        Args:
            pixel_values (`torch.Tensor` of shape `(3, height, width)`): The image, for the vision tower.
            questions (`Sequence[TextSegment]`): Questions about it.

        Returns:
            `torch.Tensor` of shape `(questions, vocabulary)`.
        """
        image = BagelRow(self.config)
        image.add_pixels(pixel_values)
        rows = []
        for question in questions:
            row = BagelRow(self.config, image.position, image.num_blocks)
            row.add_text(question.content_ids)
            rows.append(row)
        num_slots = max(len(row.input_ids) for row in rows) + 1
        cache, _ = self.prefill_rows([image], group_size=len(rows), capacity=num_slots)
        self.extend(cache, rows)
        start = torch.full((len(rows),), self.config.bos_token_id, device=cache.positions.device)
        return self._feed(cache, start, torch.ones_like(start, dtype=torch.bool))
