# SPDX-License-Identifier: Apache-2.0

"""Reader of recorded tensors of a reference implementation, to compare against."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Golden:
    """
    A folder of recorded inputs and outputs of a model, with the weights that produced them.

    Args:
        root (`str` or `Path`):
            Folder with `checkpoint/`, `config.json`, `io.json`, `io.safetensors` and `noise_floor.json`.

    Example:

    ```python
    golden = Golden("tests/golden")
    golden.check("text/op0/logits", logits)
    ```
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.checkpoint = self.root / "checkpoint"
        self.config: dict[str, Any] = self._json("config")
        self._noise_floor: dict[str, float] = self._json("noise_floor")["floor"]
        record = self._json("io")
        self.cases: dict[str, Any] = record["cases"]
        self.images: dict[str, Any] = record["images"]
        self._tensors = load_file(self.root / "io.safetensors")

    def _json(self, name: str) -> Any:
        return json.loads((self.root / f"{name}.json").read_text(encoding="utf-8"))

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self._tensors

    def keys(self, prefix: str = "") -> list[str]:
        """Names of the tensors that start with `prefix`."""
        return [key for key in self._tensors if key.startswith(prefix)]

    def case(self, name: str) -> Any:
        """Token ids, positions and arguments of one recorded case."""
        return self.cases[name]

    def weights(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """State dicts of the model and of the VAE, under the reference's names."""
        model, vae = (
            {key: value.to(dtype) for key, value in load_file(self.checkpoint / f"{name}.safetensors").items()}
            for name in ("ema", "ae")
        )
        return model, vae

    def vae_pixels(self, image: str) -> torch.Tensor:
        """What the VAE gets of a named image: `(3, height, width)` in [-1, 1]."""
        return self[f"image/{image}/resized_u8"].permute(2, 0, 1).float() / 127.5 - 1

    def vit_pixels(self, image: str) -> torch.Tensor:
        """What the vision tower gets of a named image: `(3, height, width)` in [-1, 1]."""
        return self[f"image/{image}/vit_pixels"]

    def tolerance(self, key: str, factor: float = 20.0, base: float = 2e-5) -> float:
        """Largest difference that the noise of valid evaluations explains, with a margin of `factor`."""
        return max(base, factor * self._noise_floor[key])

    def check(self, key: str, actual: torch.Tensor, factor: float = 20.0, base: float = 2e-5) -> None:
        """
        Assert that a tensor equals the recorded one, each within its own tolerance.

        For 8-bit images the noise floor is the fraction of differing values: a few may differ by one.
        """
        expected = self[key]
        actual = actual.detach().cpu()
        if expected.dtype != torch.uint8:
            atol = self.tolerance(key, factor, base)
            torch.testing.assert_close(
                actual.double(), expected.double(), rtol=0, atol=atol, msg=lambda text: f"{key}: {text}"
            )
            return
        assert actual.shape == expected.shape, f"{key}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        difference = (actual.int() - expected.int()).abs()
        fraction, allowed = (difference > 0).float().mean().item(), self.tolerance(key, factor, base=0.01)
        assert difference.max() <= 1, f"{key}: values differ by up to {difference.max()}"
        assert fraction <= allowed, f"{key}: {fraction:.2%} of the values differ, {allowed:.2%} may"
