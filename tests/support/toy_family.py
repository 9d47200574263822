# SPDX-License-Identifier: Apache-2.0

"""
A model family as small as the contract allows, as a third party would write it: one dense transformer for text and
latents, no vision tower, an orthogonal map of pixel patches as autoencoder, and plain guidance with a negative prompt.
Its cache holds the segments of a row, and every call reads them anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.flow.guidance import GuidanceConfig, PlainGuidance
from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.models import contract
from alphagrpo_ext.models.pixels import image_to_tensor
from alphagrpo_ext.models.token_sampling import sample_tokens
from alphagrpo_ext.models.token_scores import score_tokens
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment, Trajectory


ROLES = {"system": 0, "user": 1, "assistant": 2}
END = 3
PATCH = 4
CHANNELS = 3 * PATCH**2


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    vocab_size, hidden_size, num_layers, image_token_id = 48, 32, 2, 4


class ToyRow(list):
    """Tokens of one sequence, as `(id, image, time, latent)`. The image of a text's tokens is -1."""

    def add(self, segments: Sequence[Segment]) -> ToyRow:
        for segment in segments:
            if isinstance(segment, TextSegment):
                self.add_ids([ROLES[segment.role], *segment.content_ids, END])
            else:
                self.add_latents(segment.latents, 0.0)
        return self

    def add_ids(self, ids: Sequence[int]) -> ToyRow:
        self += [(token_id, -1, 0.0, torch.zeros(CHANNELS)) for token_id in ids]
        return self

    def add_latents(self, latents: torch.Tensor, time: float) -> ToyRow:
        start = len(self)
        self += [(0, start, time, latent) for latent in latents.float().cpu()]
        return self


def collate(rows: Sequence[ToyRow]) -> dict[str, torch.Tensor]:
    """`ids`, `images` (-2 on padding) and `times` `(rows, tokens)`, and `latents` `(rows, tokens, channels)`."""
    columns = [[*zip(*row, strict=True)] for row in rows]
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    return {
        "ids": pad([torch.tensor(ids) for ids, *_ in columns]),
        "images": pad([torch.tensor(images) for _, images, *_ in columns], padding_value=-2),
        "times": pad([torch.tensor(times) for *_, times, _ in columns]),
        "latents": pad([torch.stack(latents) for *_, latents in columns]),
    }


class ToyLayer(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm, self.mlp_norm = nn.RMSNorm(hidden_size), nn.RMSNorm(hidden_size)
        self.qkv, self.out = nn.Linear(hidden_size, 3 * hidden_size), nn.Linear(hidden_size, hidden_size)
        self.up, self.down = nn.Linear(hidden_size, 2 * hidden_size), nn.Linear(2 * hidden_size, hidden_size)

    def forward(self, states: torch.Tensor, mask: torch.Tensor, detached: torch.Tensor | None) -> torch.Tensor:
        query, key, value = self.qkv(self.norm(states)).chunk(3, dim=-1)
        if detached is not None:
            key, value = (torch.where(detached[..., None], x.detach(), x) for x in (key, value))
        states = states + self.out(nn.functional.scaled_dot_product_attention(query, key, value, mask))
        return states + self.down(nn.functional.silu(self.up(self.mlp_norm(states))))


@dataclass
class ToyCache:
    segments: list[list[Segment]]

    @property
    def num_rows(self) -> int:
        return len(self.segments)

    def head(self, num_rows: int) -> ToyCache:
        return ToyCache(self.segments[:num_rows])


class ToyModel(PreTrainedModel, contract.UnifiedModel):
    config_class = ToyConfig
    latent_downsample, latent_channels, max_latent_size, max_positions = PATCH, CHANNELS, 8, 512
    branches = ("full", "negative")

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(self.max_positions, config.hidden_size)
        self.proj_in = nn.Linear(CHANNELS, config.hidden_size)
        self.time = nn.Linear(2, config.hidden_size)
        self.layers = nn.ModuleList(ToyLayer(config.hidden_size) for _ in range(config.num_layers))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.proj_out = nn.Linear(config.hidden_size, CHANNELS)
        self.register_buffer(
            "autoencoder", torch.linalg.qr(torch.randn(CHANNELS, CHANNELS, dtype=torch.float32, device="cpu")).Q
        )
        self.generation_config = GenerationConfig(eos_token_id=END)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def guidance(self, settings: GuidanceConfig) -> PlainGuidance:
        return PlainGuidance(settings)

    def num_positions(self, segments: Sequence[Segment]) -> int:
        return sum(len(s.token_ids) + 2 if isinstance(s, TextSegment) else s.grid[0] * s.grid[1] for s in segments)

    def text_slots(self, max_new_tokens: int) -> int:
        return max_new_tokens + 2

    def image_slots(self, grid: tuple[int, int]) -> int:
        return grid[0] * grid[1]

    def run(self, inputs: dict[str, torch.Tensor], detached: torch.Tensor | None = None) -> torch.Tensor:
        """Hidden states `(rows, tokens, hidden)` of what [`collate`] gives."""
        images, times = inputs["images"], inputs["times"]
        index = torch.arange(images.shape[1], device=images.device)
        latents = self.proj_in(inputs["latents"]) + self.time(torch.stack([times, times.square()], dim=-1))
        states = torch.where(images[..., None] >= 0, latents, self.embed(inputs["ids"])) + self.positions(index)
        same_image = (images[:, :, None] == images[:, None]) & (images[:, None] >= 0)
        mask = ((index[:, None] >= index) | same_image) & (images[:, None] > -2) | (index[:, None] == index)
        for layer in self.layers:
            states = layer(states, mask, detached)
        return states

    def pack(
        self, trajectories: Sequence[Trajectory], guidance: GuidanceConfig | Sequence[GuidanceConfig]
    ) -> contract.PackedBatch:
        each = [guidance] * len(trajectories) if isinstance(guidance, GuidanceConfig) else guidance
        guides = [self.guidance(settings) for settings in each]
        rows, copies, keys, scores, image_trajectory = [], [], [], [], []
        for index, trajectory in enumerate(trajectories):
            row, column = ToyRow(), 0
            for i, segment in enumerate(trajectory.segments):
                if segment.sampled and isinstance(segment, TextSegment):
                    ids = segment.token_ids
                    scores += [(index, len(row) + j, token, column + j) for j, token in enumerate(ids)]
                    column += len(ids)
                if segment.sampled and isinstance(segment, ImageSegment) and segment.window is not None:
                    times = segment.window.timesteps[:-1].tolist()
                    for step, name in (
                        (s, name) for s, t in enumerate(times) for name in guides[index].branches_at(t)
                    ):
                        seen = segment.guidance_contexts[name] if name != "full" else trajectory.segments[:i]
                        copies.append(ToyRow().add(seen).add_latents(segment.window.latents[step], times[step]))
                        keys.append((len(image_trajectory), step, self.branches.index(name), len(segment.latents)))
                    image_trajectory.append(index)
                row.add([segment])
            rows.append(row)
        table = torch.tensor(scores, dtype=torch.long).reshape(-1, 4)
        inputs = collate([*rows, *copies]) | {"places": table[:, :2], "targets": table[:, 2]}
        layout = None
        if keys:
            image, step, branch, lengths = torch.tensor(keys).T
            offsets = torch.arange(int(lengths.max()))
            starts = torch.tensor([len(row) for row in copies]) - lengths
            mask = offsets < lengths[:, None]
            inputs["velocity_index"] = torch.where(mask, starts[:, None] + offsets, 0)
            layout = contract.VelocityLayout(image, step, branch, mask, self.branches)
        own = tuple(guides[index] for index in image_trajectory)
        return contract.PackedBatch(inputs, table[:, 0], table[:, 3], layout, torch.tensor(image_trajectory), own)

    def forward(
        self, temperature: float = 1.0, context_gradient: str = "exact", **inputs: torch.Tensor
    ) -> contract.PackedOutput:
        images, velocity_index = inputs["images"], inputs.get("velocity_index")
        velocities, detached = None, None
        if velocity_index is not None and context_gradient == "detached":
            # The context of a copy is everything in its row but the noised image, which is its last block.
            detached = images != images.amax(dim=1, keepdim=True)
            detached[: -len(velocity_index)] = False
        states = self.run(inputs, detached)
        scored = states[tuple(inputs["places"].T)]
        scores = score_tokens(self.lm_head, scored, inputs["targets"], self.config.vocab_size, temperature)
        if velocity_index is not None:
            copies = states[-len(velocity_index) :]
            velocities = self.proj_out(copies[torch.arange(len(copies))[:, None], velocity_index]).float()
        return contract.PackedOutput(*scores, velocities)

    @torch.no_grad()
    def prefill(
        self, contexts: Sequence[Sequence[Segment]], group_size: int = 1, capacity: int = 0, past: Any | None = None
    ) -> ToyCache:
        return ToyCache([list(context) for context in contexts for _ in range(group_size)])

    def next_logits(self, rows: Sequence[ToyRow]) -> torch.Tensor:
        """Logits `(rows, vocabulary)` of the token after each row."""
        inputs = {name: tensor.to(self.device) for name, tensor in collate(rows).items()}
        last = torch.tensor([len(row) - 1 for row in rows])
        return self.lm_head(self.run(inputs)[torch.arange(len(rows)), last])

    @torch.no_grad()
    def sample_text(
        self, cache: ToyCache, uniforms: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
    ) -> contract.SampledText:
        texts: list[list[int]] = [[] for _ in uniforms]
        log_probs: list[list[float]] = [[] for _ in uniforms]
        for step in range(uniforms.shape[1]):
            contexts = zip(cache.segments, texts, strict=False)
            rows = [ToyRow().add(context).add_ids([ROLES["assistant"], *ids]) for context, ids in contexts]
            uniform = uniforms[:, step].to(self.device)
            sampled = sample_tokens(self.next_logits(rows), uniform, temperature, top_k, top_p)
            for ids, values, token, log_prob in zip(texts, log_probs, *(x.tolist() for x in sampled), strict=True):
                if END not in ids:
                    ids.append(token)
                    values.append(log_prob)
        ended = [END in ids for ids in texts]
        for segments, ids, has_ended in zip(cache.segments, texts, ended, strict=False):
            segments.append(TextSegment(ids, sampled=True, ended=has_ended))
        return contract.SampledText(texts, log_probs, ended)

    @torch.no_grad()
    def predict_velocity(
        self, cache: ToyCache, latents: torch.Tensor, grid: tuple[int, int], timestep: torch.Tensor
    ) -> torch.Tensor:
        forks = len(latents) // cache.num_rows
        rows = [
            ToyRow().add(cache.segments[i // forks]).add_latents(x, float(timestep)) for i, x in enumerate(latents)
        ]
        states = self.run({name: tensor.to(self.device) for name, tensor in collate(rows).items()})
        ends = [len(row) for row in rows]
        return self.proj_out(torch.stack([x[n - latents.shape[1] : n] for x, n in zip(states, ends, strict=True)]))

    @torch.no_grad()
    def answer_logits(self, pixel_values: torch.Tensor, questions: Sequence[TextSegment]) -> torch.Tensor:
        latents = self.encode_images(pixel_values[None].to(self.device))[0]
        rows = [ToyRow().add_latents(latents, 0.0).add([question]) for question in questions]
        return self.next_logits([row.add_ids([ROLES["assistant"]]) for row in rows])

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2) @ self.autoencoder

    def decode_latents(self, latents: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        patches = (latents @ self.autoencoder.T).transpose(1, 2)
        return nn.functional.fold(patches, (grid[0] * PATCH, grid[1] * PATCH), PATCH, stride=PATCH)


class ToyProcessor(ProcessorMixin, contract.UnifiedProcessor):
    def __init__(self, tokenizer: Any = None, **kwargs: Any) -> None:
        super().__init__(tokenizer, **kwargs)

    def text_segment(self, text: str) -> TextSegment:
        return TextSegment(self.tokenizer.encode(text, add_special_tokens=False))

    def system_segments(self, think: bool, edits: bool) -> list[TextSegment]:
        text = "edit" if edits else "paint"
        return [TextSegment(self.text_segment(text).token_ids, role="system")] if think else []

    def reflection_request(self, prompt: str, may_stop: bool = False) -> str:
        return f"fix: {prompt}"

    def resize_image(self, image: Image.Image) -> Image.Image:
        sides = [max(PATCH, side // PATCH * PATCH) for side in image.size]
        return to_rgb(image).resize(tuple(sides))

    def question_pixels(self, image: Image.Image) -> torch.Tensor:
        return image_to_tensor(self.resize_image(image))

    @torch.no_grad()
    def image_segment(self, image: Image.Image, model: ToyModel) -> ImageSegment:
        pixels = self.question_pixels(image)
        latents = model.encode_images(pixels[None].to(model.device))[0].cpu()
        return ImageSegment(latents, (pixels.shape[1] // PATCH, pixels.shape[2] // PATCH), image=image)

    def branch_context(self, branch: str, context: Sequence[Segment], size: tuple[int, int]) -> list[Segment]:
        return list(context) if branch == "full" else [self.text_segment("blurry")]


class ToyFamily(contract.Family):
    model_class = ToyModel
    processor_class = ToyProcessor
    lora_presets = {"both": r".*layers\.\d+\.(qkv|out|up|down)"}

    def is_generation_parameter(self, name: str) -> bool:
        return "proj_out." in name


def make_toy_processor() -> ToyProcessor:
    """The processor, with a tokenizer of characters, "yes" and "no"."""
    words = ["[system]", "[user]", "[assistant]", "[end]", "[unknown]", "yes", "no", *" abcdefghijklmnopqrstuvwxyz.,:"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unknown]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split(Regex("yes|no|."), "isolated"), decoders.Fuse()
    return ToyProcessor(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[end]", unk_token="[unknown]"))
