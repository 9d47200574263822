# SPDX-License-Identifier: Apache-2.0

"""Chat templates in pieces, and trajectories as rows of tokens."""

from collections.abc import Sequence

import pytest
import torch

from alphagrpo_ext.models.cosmos3.chat_template import chat_pieces
from alphagrpo_ext.models.cosmos3.configuration_cosmos3 import Cosmos3Config
from alphagrpo_ext.models.cosmos3.layout import (
    ContextRow,
    LatentBlock,
    collate_contexts,
    collate_latents,
    stream_mask,
)
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment
from models.cosmos3.tiny_cosmos3 import TEMPLATES, VARIANTS, make_tiny_tokenizer, tiny_config


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(variant: str) -> Cosmos3Config:
    return tiny_config(variant)


def text(variant: str, content: str, **options: object) -> TextSegment:
    ids = make_tiny_tokenizer(variant).encode(content, add_special_tokens=False)
    return TextSegment(ids, **options)


def thought(variant: str, content: str, ended: bool = True) -> TextSegment:
    tokenizer = make_tiny_tokenizer(variant)
    ids = tokenizer.encode(content, add_special_tokens=False) + [tokenizer.eos_token_id] * ended
    return TextSegment(ids, sampled=True, ended=ended)


def image(rows: int, columns: int, seed: int = 0) -> ImageSegment:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows * columns, 64, generator=generator)
    return ImageSegment(latents, (rows, columns), torch.rand(3, 32 * rows, 32 * columns, generator=generator))


def shown(row: ContextRow) -> str:
    return make_tiny_tokenizer(row.config.variant).decode(row.ids)


OPENING = {
    "omni": "<|im_start|>user\n",
    "edge": "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n",
}
HEADER = {"omni": "<|im_start|>assistant\n", "edge": "<|im_start|>assistant\n<think>\n"}


class TestChatPieces:
    def test_rows_are_what_the_template_renders(self, variant: str, config: Cosmos3Config) -> None:
        tokenizer = make_tiny_tokenizer(variant)
        for messages in ([("user", "paint")], [("system", "be kind"), ("user", "paint a cat")]):
            conversation = [{"role": role, "content": content} for role, content in messages]
            expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            row = ContextRow.of([text(variant, content, role=role) for role, content in messages], config)
            assert row.ids == expected

    def test_images_are_what_the_template_renders(self, variant: str, config: Cosmos3Config) -> None:
        tokenizer = make_tiny_tokenizer(variant)
        content = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
        conversation = [{"role": "user", "content": content}]
        expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
        assert ContextRow.of([image(1, 1), text(variant, "what is it?")], config).ids == expected

    def test_an_answer_begins_without_a_thought(self, variant: str, config: Cosmos3Config) -> None:
        row = ContextRow(config).add([text(variant, "why?")]).begin_reply(thinks=False)
        end = {"omni": "<|im_start|>assistant\n", "edge": "<|im_start|>assistant\n<think></think>"}
        assert shown(row).endswith(end[variant])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda template: None, "no chat template"),
            (
                lambda template: template.replace("+ text_of(message.content)", "+ text_of(message.content) * 2"),
                "2 times",
            ),
            (
                lambda template: template.replace("text_of(message.content) +", "text_of(message.content) + '!' +"),
                "<|im",
            ),
        ],
    )
    def test_a_template_that_does_not_split_is_refused(self, change: object, message: str) -> None:
        tokenizer = make_tiny_tokenizer("omni")
        tokenizer.chat_template = change(TEMPLATES["omni"])
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            chat_pieces(tokenizer)

    def test_a_tokenizer_that_joins_text_and_template_is_refused(self) -> None:
        tokenizer = make_tiny_tokenizer("omni")
        tokenizer.add_tokens(["\nUSERTEXT"])
        with pytest.raises(ValueError, match="joins the tokens"):
            chat_pieces(tokenizer)


class TestContextRow:
    def test_two_rounds(self, variant: str, config: Cosmos3Config) -> None:
        """The image of a round stands before the next request, and a thought that was cut is ended."""
        segments: list[Segment] = [image(1, 2), text(variant, "mend"), thought(variant, "hm", ended=False)]
        row = ContextRow.of([*segments, image(1, 1), text(variant, "more")], config)
        assert shown(row) == (
            f"{OPENING[variant]}<|vision_start|><|image_pad|><|image_pad|><|vision_end|>mend<|im_end|>\n"
            f"{HEADER[variant]}hm<|im_end|>\n"
            f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>more<|im_end|>\n{HEADER[variant]}"
        )

    def test_a_round_without_a_thought_is_an_empty_reply(self, variant: str, config: Cosmos3Config) -> None:
        row = ContextRow.of([text(variant, "cat")], config)
        tail = row.tail()
        assert tail.ids == [config.eos_token_id, config.vision_start_token_id]
        assert (tail.horizon, tail.first_position) == (len(row.ids), len(row.ids))
        row.add([image(1, 1)])
        assert f"{HEADER[variant]}<|im_end|>\n<|im_start|>user\n<|vision_start|>" in shown(row)

    @pytest.mark.parametrize("ended", [True, False])
    def test_a_tail_after_a_thought(self, variant: str, config: Cosmos3Config, ended: bool) -> None:
        row = ContextRow.of([text(variant, "cat"), thought(variant, "hm", ended)], config)
        assert shown(row).endswith(f"{HEADER[variant]}hm<|im_end|>")
        assert row.tail().ids == [config.vision_start_token_id]

    def test_positions(self, variant: str, config: Cosmos3Config) -> None:
        row = ContextRow(config).add([image(2, 3), text(variant, "a")])
        start = row.images[0].start
        assert row.positions[start - 1] == (start - 1,) * 3
        grid = [(start, start + y, start + x) for y in range(2) for x in range(3)]
        assert row.positions[start : start + 6] == grid
        assert row.positions[start + 6 :] == [(start + 3,) * 3, (start + 4,) * 3]

    def test_common_tokens(self, variant: str, config: Cosmos3Config) -> None:
        one, same, other = image(1, 2), image(1, 2), image(1, 2, seed=1)
        request = text(variant, "cat")
        row = ContextRow.of([one, request], config)
        assert row.equals(ContextRow.of([same, request], config))
        assert row.num_common_tokens(ContextRow.of([one, text(variant, "car")], config)) == row.images[0].start + 5
        assert row.num_common_tokens(ContextRow.of([other, request], config)) == row.images[0].start
        repainted = ImageSegment(other.latents, one.grid, one.pixel_values)
        assert not row.equals(ContextRow.of([repainted, request], config))

    def test_a_model_without_a_vision_tower_refuses_images(self, variant: str) -> None:
        with pytest.raises(ValueError, match="no vision tower"):
            ContextRow(tiny_config(variant, vision=False)).add([image(1, 1)])

    def test_an_image_that_was_not_looked_at_is_refused(self, config: Cosmos3Config) -> None:
        unseen = ImageSegment(torch.zeros(1, 64), (1, 1))
        with pytest.raises(ValueError, match="pixel_values"):
            ContextRow(config).add([unseen])

    def test_a_configuration_without_pieces_is_refused(self) -> None:
        with pytest.raises(ValueError, match="chat_pieces"):
            ContextRow(tiny_config("omni", chat_pieces=None))


def visible(mask: torch.Tensor) -> list[list[int]]:
    return [row.nonzero().flatten().tolist() for row in mask]


def test_masks_of_conversations_and_tails(config: Cosmos3Config, variant: str) -> None:
    """A tail sees its own part of the conversation and itself, and nothing sees a tail."""
    row = ContextRow.of([text(variant, "cat")], config)
    first = row.tail()
    length = len(row.ids)
    row.add([thought(variant, "a")])
    second = row.tail()
    short = ContextRow(config).begin_reply()
    inputs = collate_contexts([row, short], [[first, second], []])
    mask = visible(stream_mask(inputs["horizons"], inputs["forks"])[0])
    total = len(row.ids)
    assert mask[:total] == [list(range(i + 1)) for i in range(total)]
    assert mask[total:] == [
        [*range(length), total],
        [*range(length), total, total + 1],
        [*range(total), total + 2],
    ]
    assert inputs["input_ids"][0, total:].tolist() == [*first.ids, *second.ids]
    assert inputs["positions"][0, :, total:].tolist() == [[length, length + 1, total]] * 3
    padding = inputs["horizons"][1, len(short.ids) :]
    assert not padding.any() and not inputs["forks"][1].any()


def test_latents_of_several_sizes(config: Cosmos3Config) -> None:
    """Clean images come first, each at a time of its own, and rows and columns begin anew."""
    clean, noised = image(1, 2), torch.ones(2, 64)
    blocks = [LatentBlock([clean], noised, (2, 1), 7), LatentBlock([], noised[:1], (1, 1), 3)]
    inputs = collate_latents(blocks, config)
    assert inputs["noised"].tolist() == [[False, False, True, True], [True, False, False, False]]
    assert inputs["valid"].tolist() == [[True] * 4, [True, False, False, False]]
    assert torch.equal(inputs["latents"][0, :2], clean.latents)
    time = 7 + config.latent_margin
    assert inputs["latent_positions"][0].tolist() == [[time] * 2 + [time + 1] * 2, [0, 0, 0, 1], [0, 1, 0, 0]]
    assert inputs["latent_positions"][1, :, 0].tolist() == [3 + config.latent_margin, 0, 0]


def test_images_are_read_once(config: Cosmos3Config, variant: str) -> None:
    one, other = image(1, 2), image(2, 1, seed=1)
    contexts: Sequence[Sequence[Segment]] = [[one, text(variant, "a")], [text(variant, "bb"), one, other]]
    rows = [ContextRow.of(context, config) for context in contexts]
    inputs = collate_contexts(rows, [[], []])
    assert inputs["pixels"].shape == (2, 3, 64, 64)
    assert inputs["pixel_sizes"].tolist() == [[32, 64], [64, 32]]
    assert inputs["feature_index"].tolist() == [0, 1, 0, 1, 2, 3]
    ids = inputs["input_ids"].flatten()[inputs["feature_places"]]
    assert ids.tolist() == [config.image_token_id] * 6
    assert inputs["feature_places"].tolist() == sorted(inputs["feature_places"].tolist())
