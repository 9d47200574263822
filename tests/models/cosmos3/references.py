# SPDX-License-Identifier: Apache-2.0

"""
What Diffusers and Transformers compute for a tiny Cosmos3, one sample at a time, and the same by our networks in one
padded batch.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from diffusers.models.transformers.transformer_cosmos3 import Cosmos3OmniTransformer
from torch import nn
from transformers.models.cosmos3_edge.image_processing_pil_cosmos3_edge import Cosmos3EdgeImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from alphagrpo_ext.models.cosmos3.transformer import StreamStates
from models.cosmos3.tiny_cosmos3 import Parts, References


MARGIN = 15000


@dataclass
class Row:
    """
    A context: token ids in which an image has one placeholder per token, the images, and latents in its gen stream.

    Args:
        ids (`list[int]`): Token ids.
        images (`list[torch.Tensor]`): Pixels `(3, height, width)` of the images in the understanding stream.
        items (`list[torch.Tensor]`): Latents `(1, channels, 1, height, width)`: clean ones, and the noised one last.
        time (`float`): Time of the noised latents.
    """

    ids: list[int]
    images: list[torch.Tensor] = field(default_factory=list)
    items: list[torch.Tensor] = field(default_factory=list)
    time: float = 0.5

    @property
    def item_grids(self) -> list[tuple[int, int]]:
        return [(item.shape[-2] // 2, item.shape[-1] // 2) for item in self.items]


def context_positions(row: Row, image_token_id: int) -> tuple[torch.Tensor, int]:
    """Positions `(3, tokens)` of a context by Qwen's rule, and the position of what follows."""
    grids = iter([(image.shape[-2] // 32, image.shape[-1] // 32) for image in row.images])
    parts, place, i = [], 0, 0
    while i < len(row.ids):
        if row.ids[i] != image_token_id:
            parts.append(torch.full((3, 1), place))
            place, i = place + 1, i + 1
            continue
        height, width = next(grids)
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(torch.stack([torch.zeros_like(rows), rows, columns]).flatten(1) + place)
        place, i = place + max(height, width), i + height * width
    return torch.cat(parts, dim=1).float(), place


def latent_positions(row: Row, start: int, margin: int = MARGIN) -> torch.Tensor:
    """Positions `(3, tokens)` of the latents of a row: items follow each other in time, and each begins at 0, 0."""
    parts = []
    for i, (height, width) in enumerate(row.item_grids):
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        parts.append(torch.stack([torch.full_like(rows, start + margin + i), rows, columns]).flatten(1))
    return torch.cat(parts, dim=1).float()


def image_inputs(variant: str, images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Patch rows and grids of images of eight bits by the variant's image processor, without a resize."""
    processor = Qwen2VLImageProcessorPil(patch_size=16) if variant == "omni" else Cosmos3EdgeImageProcessorPil()
    half = [0.5, 0.5, 0.5]
    inputs = processor(
        [((image + 1) * 127.5).round().byte() for image in images],
        do_resize=False,
        image_mean=half,
        image_std=half,
        return_tensors="pt",
    )
    return {"pixel_values": inputs["pixel_values"], "image_grid_thw": inputs["image_grid_thw"]}


def reasoner_logits(reasoner: nn.Module, row: Row, **inputs: torch.Tensor) -> torch.Tensor:
    """Logits `(tokens, vocabulary)` of Transformers' model."""
    ids = torch.tensor([row.ids])
    config = reasoner.config
    if row.images:
        variant = "omni" if config.model_type == "cosmos3_omni" else "edge"
        inputs = image_inputs(variant, row.images) | inputs
    types = (ids == config.image_token_id).int()
    return reasoner(input_ids=ids, mm_token_type_ids=types, **inputs).logits[0]


def flat_forward(
    transformer: Cosmos3OmniTransformer,
    row: Row,
    image_token_id: int = -1,
    features: torch.Tensor | None = None,
    deepstack: Sequence[torch.Tensor] = (),
    margin: int = MARGIN,
) -> torch.Tensor:
    """
    Velocity `(tokens, channels)` of the noised item by Diffusers' transformer.

    A vision tower's output is put into its understanding stream by hooks, since no pipeline of the library does so.
    """
    (positions, start), count = context_positions(row, image_token_id), len(row.ids)
    grids = row.item_grids
    sizes = [height * width for height, width in grids]
    num_clean = sum(sizes[:-1])
    places = torch.tensor(row.ids) == image_token_id

    def put_features(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output.masked_scatter(places[:, None], features)

    def add_features(i: int):
        def hook(module: nn.Module, args: tuple, output: tuple) -> tuple:
            und = output[0].clone()
            und[places] = und[places] + deepstack[i]
            return und, output[1]

        return hook

    with ExitStack() as hooks:
        if features is not None:
            hooks.callback(transformer.embed_tokens.register_forward_hook(put_features).remove)
        for i in range(len(deepstack)):
            hooks.callback(transformer.layers[i].register_forward_hook(add_features(i)).remove)
        sample = transformer(
            input_ids=torch.tensor(row.ids),
            text_indexes=torch.arange(count),
            position_ids=torch.cat([positions, latent_positions(row, start, margin)], dim=1),
            und_len=count,
            sequence_length=count + sum(sizes),
            vision_tokens=row.items,
            vision_token_shapes=[(1, *grid) for grid in grids],
            vision_sequence_indexes=torch.arange(count, count + sum(sizes)),
            vision_mse_loss_indexes=torch.arange(count + num_clean, count + sum(sizes)),
            vision_timesteps=torch.full((sizes[-1],), row.time * 1000),
            vision_noisy_frame_indexes=[torch.arange(0)] * (len(sizes) - 1) + [torch.arange(1)],
        ).sample
    return tokens_of(sample[-1])


def composed_velocity(references: References, row: Row, image_token_id: int) -> torch.Tensor:
    """Velocity by Diffusers' transformer with the features of Transformers' vision tower."""

    def join(images: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        return images if isinstance(images, torch.Tensor) else torch.cat(list(images))

    variant = "omni" if references.reasoner.config.model_type == "cosmos3_omni" else "edge"
    output = references.reasoner.model.get_image_features(**image_inputs(variant, row.images))
    deepstack = [join(layer) for layer in output.deepstack_features] if variant == "omni" else ()
    return flat_forward(references.transformer, row, image_token_id, join(output.pooler_output), deepstack)


def tokens_of(latents: torch.Tensor) -> torch.Tensor:
    """Tokens `(tokens, channels)` of latents `(1, channels, 1, height, width)`."""
    blocks = latents[0, :, 0].unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    return blocks.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


@dataclass
class Understood:
    """Rows that were read by our understanding stream in one padded batch."""

    logits: list[torch.Tensor]
    states: StreamStates
    lengths: list[int]
    starts: list[int]


def understand(
    parts: Parts,
    rows: Sequence[Row],
    deepstack: bool = True,
    positions: Sequence[torch.Tensor] | None = None,
) -> Understood:
    """Read contexts in one batch, padded at the end."""
    config = parts.transformer.config
    places = [context_positions(row, config.image_token_id) for row in rows]
    given = [place[0] for place in places] if positions is None else positions
    lengths = [len(row.ids) for row in rows]
    longest = max(lengths)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    batched = torch.zeros(3, len(rows), longest)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.tensor(row.ids)
        batched[:, i, : lengths[i]] = given[i]
    is_token = torch.arange(longest) < torch.tensor(lengths)[:, None]
    mask = torch.ones(longest, longest, dtype=torch.bool).tril() & is_token[:, None, :, None] & is_token[:, None, None]
    states, stacked = parts.transformer.embed(ids), None
    images = [image for row in rows for image in row.images]
    if images:
        features, added = parts.vision(images)
        is_image = (ids == config.image_token_id) & is_token
        states = states.masked_scatter(is_image[..., None], features)
        stacked = (is_image, added) if deepstack else None
    states, context = parts.transformer.understand(states, batched, mask, deepstack=stacked)
    logits = parts.transformer.lm_head(states)
    return Understood(
        [logits[i, :length] for i, length in enumerate(lengths)], context, lengths, [start for _, start in places]
    )


def denoise(
    parts: Parts,
    rows: Sequence[Row],
    understood: Understood,
    margin: int = MARGIN,
    context_rows: Sequence[int] | None = None,
    is_all_noised: bool = False,
) -> list[torch.Tensor]:
    """
    Velocities of the noised item of every row by our generation stream, in one batch, padded at the end.

    `is_all_noised` takes clean items for noised ones.
    """
    tokens = [torch.cat([tokens_of(item) for item in row.items]) for row in rows]
    sizes = [len(row_tokens) for row_tokens in tokens]
    targets = [row.item_grids[-1][0] * row.item_grids[-1][1] for row in rows]
    longest, context = max(sizes), max(understood.lengths)
    batched = tokens[0].new_zeros(len(rows), longest, tokens[0].shape[-1])
    positions = torch.zeros(3, len(rows), longest)
    noised = torch.zeros(len(rows), longest, dtype=torch.bool)
    mask = torch.zeros(len(rows), 1, longest, context + longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        batched[i, : sizes[i]] = tokens[i]
        source = i if context_rows is None else context_rows[i]
        positions[:, i, : sizes[i]] = latent_positions(row, understood.starts[source], margin)
        noised[i, 0 if is_all_noised else sizes[i] - targets[i] : sizes[i]] = True
        mask[i, :, : sizes[i], : understood.lengths[source]] = True
        mask[i, :, : sizes[i], context : context + sizes[i]] = True
    times = torch.tensor([row.time for row in rows])
    shared = None if context_rows is None else torch.tensor(context_rows)
    velocities = parts.transformer.denoise(batched, noised, times, positions, understood.states, mask, shared)
    return [velocities[i, sizes[i] - targets[i] : sizes[i]] for i in range(len(rows))]
