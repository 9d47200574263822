# SPDX-License-Identifier: Apache-2.0

"""The model card of a trained model or adapter: how to load it, how it was trained, and what it scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from alphagrpo_ext.files import write_text
from alphagrpo_ext.printable import printable


_TITLE = "AlphaGRPO: Unlocking Self-Reflective Multimodal Generation in UMMs via Decompositional Verifiable Reward"
PAPER = {
    "title": _TITLE,
    "id": "2605.12495",
    "citation": f"""\
@misc{{alphagrpo2026,
    title  = {{{{{_TITLE}}}}},
    year   = 2026,
    eprint = {{2605.12495}},
    archivePrefix = {{arXiv}},
}}""",
}
"""The paper of the method, as TRL's trainers name theirs."""

CARD_NAME = "README.md"
_HUB_TAGS = ("alphagrpo", "trl", "grpo", "unified-multimodal-model")

TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ "An adapter (PEFT) for the" if card.is_adapter else "The" }} unified multimodal model {{ card.base_model }}, trained{{ " for the task `" ~ card.task ~ "`" if card.task }} with
[AlphaGRPO](https://huggingface.co/papers/2605.12495), by [TRL](https://github.com/huggingface/trl) and alphagrpo-ext. The model
writes a thought and then paints an image.

## Use

```bash
pip install -e .  # in a copy of the repository of alphagrpo-ext
```

```python
import alphagrpo_ext

pipe = alphagrpo_ext.pipeline({{ path }})
output = pipe({{ prompt }}{{ card.call_settings }})
output.images[0].save("image.png")
print(output.texts[0])
```
{% if card.is_adapter %}
The model that the adapter was made for, {{ card.base_model }}, is loaded with it.
{% endif %}{% if card.table %}
## Scores on held-out prompts

```text
{{ card.table }}
```

`n` is the number of scored images. `a -> b` is {{ card.compared }}, followed by the difference, for rates in percentage points.
*reward* is the mean reward of an image, from 0 to 1; *strict pass* is the share of images for which every question is answered
yes.
{% endif %}{% if card.picture %}
![Images before and after]({{ card.picture }})
{% endif %}{% if card.facts or card.command %}
## Training
{% if card.command %}
```bash
{{ card.command }}
```
{% endif %}
{% for name, value in card.facts.items() %}- {{ name }}: {{ value }}
{% endfor %}{% endif %}
## Citation

```bibtex
{{ citation }}
```
"""


@dataclass(frozen=True)
class CardContent:
    """
    What a model card says.

    Args:
        base_model (`str`): Name of the model that was trained, or that the adapter is for.
        is_adapter (`bool`, *optional*, defaults to `False`): Whether the folder holds an adapter.
        task (`str`, *optional*): Name of the task that it was trained for.
        license (`str`, *optional*): Licence of the base model, an identifier of the Hub, e.g. `"apache-2.0"`.
        prompt (`str`, *optional*): A prompt for the example.
        call_settings (`str`, *optional*): Further arguments of the example's call, e.g. `", num_rounds=1"`.
        facts (`Mapping[str, object]`, *optional*): Settings to list, each on one line.
        command (`str`, *optional*): Command line of the run.
        table (`str`, *optional*): Scores of an evaluation, as text.
        compared (`str`, *optional*): The two values of an arrow in the table.
        picture (`str`, *optional*): File of a picture in the folder.
    """

    base_model: str
    is_adapter: bool = False
    task: str | None = None
    license: str | None = None
    prompt: str = "a red circle left of a blue square , on a white background"
    call_settings: str = ""
    facts: Mapping[str, object] = field(default_factory=dict)
    command: str | None = None
    table: str | None = None
    compared: str = "the value before training and after it"
    picture: str | None = None


def write_model_card(
    folder: Path,
    card: CardContent,
    path: str | Path | None = None,
    tags: Iterable[str] = (),
    dataset_name: str | None = None,
) -> None:
    """
    Write `README.md` into the folder of a model or an adapter. One that is there is replaced.

    Args:
        folder (`Path`): The folder.
        card ([`CardContent`]): What it says.
        path (`str` or `Path`, *optional*): Where the model will be loaded from: an id on the Hub, or by default the folder.
        tags (`Iterable[str]`, *optional*): Further tags for the Hub.
        dataset_name (`str`, *optional*): Dataset on the Hub that the model was trained on.
    """
    path = str(path or folder)
    # The Hub refuses names that it does not know.
    on_hub = (
        card.base_model.count("/") == 1 and not card.base_model.startswith(".") and not Path(card.base_model).exists()
    )
    data = ModelCardData(
        base_model=card.base_model if on_hub else None,
        base_model_relation=("adapter" if card.is_adapter else "finetune") if on_hub else None,
        datasets=dataset_name,
        library_name="alphagrpo-ext",
        license=card.license,
        pipeline_tag="text-to-image",
        tags=list(dict.fromkeys([*_HUB_TAGS, *(["peft"] if card.is_adapter else []), *tags])),
    )
    text = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        card=replace(card, facts={name: printable(str(value)) for name, value in card.facts.items()}),
        name=path.rstrip("/").rpartition("/")[2],
        path=_quoted(path),
        prompt=_quoted(card.prompt),
        citation=PAPER["citation"],
    )
    write_text(folder / CARD_NAME, printable(str(text), keep="\n"))


def base_license(base_folder: str | Path) -> str | None:
    """The licence that the model card in a folder names, if there is one."""
    card = Path(base_folder) / CARD_NAME
    try:
        return ModelCard.load(card).data.license if card.is_file() else None
    except ValueError:
        # Its metadata cannot be read.
        return None


def _quoted(text: str) -> str:
    """A text as a literal of Python, on one line."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'
