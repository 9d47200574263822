# SPDX-License-Identifier: Apache-2.0

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

import alphagrpo_ext
from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS, load_model
from alphagrpo_ext.rollout.pipeline import UnifiedPipeline
from alphagrpo_ext.shapes.judge import answer_questions, strict_pass


README = Path(__file__).parents[2] / "README.md"
PROMPTS = ["a red circle on a white background", "two blue squares , on gray"]


@pytest.fixture(scope="module")
def pipe() -> UnifiedPipeline:
    return alphagrpo_ext.pipeline("bagel-shapes")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_paints_a_prompt_in_the_size_that_the_model_was_trained_with(pipe: UnifiedPipeline) -> None:
    output = pipe(PROMPTS[0])

    assert [image.size for image in output.images] == [(24, 24)]
    assert output.texts[0].startswith("<think>")


def test_seeds_and_images_per_prompt(pipe: UnifiedPipeline) -> None:
    both = pipe(PROMPTS, num_images_per_prompt=2, seed=1)

    assert len(both.images) == 4
    assert (pixels(both.images) == pixels(pipe(PROMPTS, num_images_per_prompt=2, seed=1).images)).all()
    assert (pixels(both.images) != pixels(pipe(PROMPTS, num_images_per_prompt=2, seed=2).images)).any()
    assert (pixels(both.images[:1]) != pixels(both.images[1:2])).any()


def test_rounds_begin_with_the_image_that_is_painted_or_given(pipe: UnifiedPipeline) -> None:
    painted = pipe(PROMPTS[0], num_rounds=2)

    assert len(painted.refinements[0].steps) == 3
    assert painted.images[0] is painted.refinements[0].steps[-1].image

    given = Image.new("RGB", (24, 24), "white")
    refined = pipe(PROMPTS[0], given, num_rounds=1)
    assert refined.refinements[0].steps[0].image is given


def test_refine_strength_is_about_rounds_alone(pipe: UnifiedPipeline) -> None:
    first, repaint = (step.image for step in pipe(PROMPTS[0], num_rounds=1).refinements[0].steps)
    same, other = (step.image for step in pipe(PROMPTS[0], num_rounds=1, refine_strength=0.6).refinements[0].steps)
    assert (pixels([first]) == pixels([same])).all()
    assert (pixels([repaint]) != pixels([other])).any()


IMAGE = Image.new("RGB", (24, 24), "white")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_timestep": 3},
            "unknown argument 'num_timestep': did you mean 'num_timesteps'. Arguments are prompt, image,",
        ),
        ({"nums_rounds": 1}, "unknown argument 'nums_rounds': did you mean 'num_rounds'"),
        ({"guidance_scale": 4.0}, "unknown argument 'guidance_scale': use cfg_text_scale"),
        ({"guidance_scal": 4.0}, "unknown argument 'guidance_scal': instead of 'guidance_scale' use cfg_text_scale"),
        ({"num_inference_steps": 10}, "use num_timesteps, which is one more than the number of steps"),
        ({"strength": 0.5}, "unknown argument 'strength': use refine_strength"),
        ({"height": 24, "width": 24}, "'height': use image_height; unknown argument 'width': use image_width"),
        ({"generator": None}, "unknown argument 'generator': use seed"),
        ({"zzz": 1}, "unknown argument 'zzz'. Arguments are prompt"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, but is 0"),
        ({"num_rounds": -1}, "num_rounds must be at least 0, but is -1"),
        ({"num_rounds": True}, "num_rounds must be an integer, but is True"),
        ({"seed": [1]}, r"seed must be an integer, but is \[1\]"),
        ({"seed": "1"}, "seed must be an integer, but is '1'"),
        ({"cfg_text_scale": "4"}, "cfg_text_scale must be a finite number, but is '4'"),
        ({"cfg_interval": 0.4}, "cfg_interval takes two numbers, but is 0.4"),
        ({"image_height": 48}, "48 x 24 pixels is too large: the model paints at most 24 x 24 pixels"),
        ({"image": IMAGE}, "set num_rounds to at least 1"),
        ({"image": [IMAGE] * 2, "num_rounds": 1}, "one image per prompt, but has 2, and the number of prompts is 1"),
        ({"image": "mine.png", "num_rounds": 1}, r"image\[0\]: there is no image mine.png"),
        (
            {"image": np.zeros((24, 24, 3)), "num_rounds": 1},
            r"image\[0\] must be a PIL image or the path of a file, .* ndarray",
        ),
    ],
)
def test_wrong_arguments_are_named(pipe: UnifiedPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **arguments)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (None, "prompt must be a text, a conversation .* but is None"),
        ({"role": "user", "content": PROMPTS[0]}, "prompt must be a text, a conversation"),
        ([], "prompt is an empty list"),
        (" ", "prompt is empty"),
        ([PROMPTS[0], None], r"prompt\[1\]: prompt must be a string or a list of messages, got NoneType"),
        ([{"role": "assistant", "content": "no"}], "prompt has no user message"),
    ],
)
def test_wrong_prompts_are_named(pipe: UnifiedPipeline, prompt: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(prompt)


def test_a_conversation_is_one_prompt(pipe: UnifiedPipeline) -> None:
    conversation = [{"role": "user", "content": PROMPTS[0]}]

    assert (pixels(pipe(conversation).images) == pixels(pipe(PROMPTS[0]).images)).all()
    assert len(pipe([conversation, conversation]).images) == 2


def test_images_are_read_from_files(pipe: UnifiedPipeline, tmp_path: Path) -> None:
    path = tmp_path / "mine.png"
    IMAGE.save(path)

    expected = pixels(pipe(PROMPTS[0], IMAGE, num_rounds=1).images)
    for given in (path, str(path), [path]):
        assert (pixels(pipe(PROMPTS[0], given, num_rounds=1).images) == expected).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"foo": 1}, "unknown argument 'foo'. Arguments are dtype, revision, attn_implementation, settings"),
        ({"torch_dtype": "bfloat16"}, "unknown argument 'torch_dtype': use dtype"),
        ({"device": "cuda"}, r"move the pipeline with pipe.to\(device\)"),
        (
            {"cfg_text_scale": 4.0},
            r"cfg_text_scale is an argument of the call, .* settings=\{'cfg_text_scale': \.\.\.\}",
        ),
    ],
)
def test_wrong_arguments_of_loading_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alphagrpo_ext.pipeline("bagel-shapes", **arguments)


def test_unknown_words_are_warned_of_once(pipe: UnifiedPipeline, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        pipe("A red circle, on a white zebra")

    (warning,) = [record.getMessage() for record in caplog.records if "does not know" in record.getMessage()]
    assert warning.endswith(
        "an unknown one: 'A' 'circle,' 'zebra'. It reads lower case, with blanks around punctuation: write 'a' for 'A', "
        "'circle ,' for 'circle,'."
    )


def test_saved_pipeline_paints_the_same(pipe: UnifiedPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "model")

    copy = alphagrpo_ext.pipeline(tmp_path / "model", settings={"num_timesteps": 11})
    assert (pixels(copy(PROMPTS).images) == pixels(pipe(PROMPTS).images)).all()
    assert "BagelModel" in repr(pipe) and "image_height=24" in repr(pipe) and "settings:" not in repr(pipe)
    assert str(tmp_path / "model") in repr(copy) and "settings: num_timesteps=11" in repr(copy)
    assert copy.tokenizer is copy.processor.tokenizer and copy.device.type == "cpu"


def test_attention_follows_the_device_unless_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention_on_a_gpu(pipe: UnifiedPipeline) -> str:
        # As if it were moved to one.
        with monkeypatch.context() as context:
            context.setattr(UnifiedPipeline, "device", torch.device("cuda"))
            return pipe.to(torch.float32).model.config._attn_implementation

    pipe = alphagrpo_ext.pipeline("bagel-shapes")
    assert pipe.model.config._attn_implementation == "eager"
    assert attention_on_a_gpu(pipe) == "sdpa"
    assert pipe.to(torch.float32).model.config._attn_implementation == "eager"
    pipe.model.set_attn_implementation("flex_attention")
    assert attention_on_a_gpu(pipe) == "flex_attention"
    given = alphagrpo_ext.pipeline("bagel-shapes", attn_implementation="eager")
    assert given.model.config._attn_implementation == attention_on_a_gpu(given) == "eager"


def test_saved_adapter_paints_the_same(tmp_path: Path) -> None:
    model, processor = load_model("bagel-shapes")
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=model.family.lora_target_modules("both"))
    adapted = UnifiedPipeline(get_peft_model(model, config).eval(), processor)
    adapted.save_pretrained(tmp_path / "adapter")

    copy = alphagrpo_ext.pipeline(tmp_path / "adapter")
    assert "config.json" not in {file.name for file in (tmp_path / "adapter").iterdir()}
    assert (pixels(copy(PROMPTS).images) == pixels(adapted(PROMPTS).images)).all()


def test_first_example_of_the_readme_paints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text(encoding="utf-8").split("\n## Use what you trained\n")[1]
    monkeypatch.chdir(tmp_path)
    exec(section.split("```python\n")[1].split("```")[0], {})

    questions = (
        *("is the circle red ?", "is the square blue ?", "is the circle left of the square ?"),
        *("is the background white ?", "is every shape complete and sharp ?"),
    )
    with Image.open("circle.png") as image:
        answers = answer_questions(image, questions)
    assert None not in answers and strict_pass(answers)


def test_package_lists_what_it_offers() -> None:
    assert {"UnifiedPipeline", "pipeline", "__version__"} <= set(dir(alphagrpo_ext))


def test_settings_of_a_checkpoint_come_before_those_of_its_family(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PACKAGED_CHECKPOINTS["bagel-shapes"], folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["sampling"] = {"task": "reasoning_t2i", "image_height": 16, "image_width": 20, "num_timesteps": 4}
    file.write_text(json.dumps(content))

    pipe = alphagrpo_ext.pipeline(folder)
    assert pipe.rollout("reasoning_t2i").denoising.num_timesteps == 4
    assert pipe.rollout("reasoning_t2i", num_timesteps=5).denoising.num_timesteps == 5
    # A task beside it keeps the guidance that it declares.
    assert pipe.rollout("self_reflection").denoising.guidance.image_scale == 2.0
    assert pipe(PROMPTS[0]).images[0].size == (20, 16)

    del content["sampling"]
    file.write_text(json.dumps(content))
    assert alphagrpo_ext.pipeline(folder).rollout("reasoning_t2i").size == (1024, 1024)
