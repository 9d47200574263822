# SPDX-License-Identifier: Apache-2.0

"""The model card of a run: how to load what was trained, how it was trained, and what it scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from alphagrpo_ext.files import write_text


TEMPLATE = """\
---
{{ card_data }}
---

# {{ name }}

{{ base }} after {{ task }} training with [AlphaGRPO](https://huggingface.co/papers/2605.12495), by
[TRL](https://github.com/huggingface/trl) and alphagrpo-ext.

## Use

```python
import alphagrpo_ext

pipe = alphagrpo_ext.pipeline("{{ path }}")
output = pipe("{{ prompt }}")
output.images[0].save("image.png")
print(output.texts[0])
```

## Scores on held-out prompts

{% if table %}```
{{ table }}
```
{% else %}The run had no evaluation.
{% endif %}{% if picture %}
![Images before and after training]({{ picture }})
{% endif %}
## Training

```bash
{{ command }}
```

{% for name, value in facts.items() %}- {{ name }}: {{ value }}
{% endfor %}
"""


def write_model_card(
    folder: Path,
    base_model: str,
    task: str,
    command: str,
    prompt: str,
    facts: Mapping[str, object],
    table: str | None = None,
    picture: str | None = None,
) -> None:
    """
    Write `README.md` into a model's folder.

    Args:
        folder (`Path`): Folder of the model.
        base_model (`str`): Name of the model that was trained.
        task (`str`): Name of its task.
        command (`str`): Command line of the run.
        prompt (`str`): A prompt for the example.
        facts (`Mapping[str, object]`): Settings to list.
        table (`str`, *optional*): Scores before and after training, as text.
        picture (`str`, *optional*): File of a picture in the folder.
    """
    data = ModelCardData(
        # The Hub knows no other names.
        base_model=base_model if base_model.count("/") == 1 and not Path(base_model).exists() else None,
        library_name="alphagrpo-ext",
        pipeline_tag="text-to-image",
        tags=["alphagrpo", "trl", "grpo", "unified-multimodal-model"],
    )
    values = {"name": folder.name, "base": base_model, "task": task, "path": folder, "command": command}
    card = ModelCard.from_template(
        data, template_str=TEMPLATE, **values, prompt=prompt, facts=facts, table=table, picture=picture
    )
    write_text(folder / "README.md", str(card))
