# SPDX-License-Identifier: Apache-2.0

"""The table of seams against the installed packages, and the source against the table."""

import ast
import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import TrainerCallback
from trl import GRPOTrainer

import alphagrpo_ext
from alphagrpo_ext.trainer import AlphaGRPOTrainer, upstream
from alphagrpo_ext.trainer.upstream import SEAMS, TESTED_TRL, Seam, check_installed, misfits


SOURCE = Path(alphagrpo_ext.__file__).parent
UPSTREAM_PACKAGES = ("trl", "transformers", "accelerate", "torch.distributed")
NAMES = {seam.name for seam in SEAMS}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def classes() -> Iterator[type]:
    """All classes that the package defines."""
    for info in pkgutil.walk_packages([str(SOURCE)], "alphagrpo_ext."):
        # What OpenRLHF loads by path is no part of the trainer and imports what need not be installed.
        if info.name.startswith("alphagrpo_ext.openrlhf"):
            continue
        module = importlib.import_module(info.name)
        yield from (
            value for value in vars(module).values() if isinstance(value, type) and value.__module__ == info.name
        )


def test_every_seam_fits_the_installed_packages() -> None:
    assert not list(misfits())


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.owner}.{seam.name}")
def test_every_seam_is_used(seam: Seam) -> None:
    assert any(seam.name in path.read_text() for path in SOURCE.rglob("*.py") if path.name != "upstream.py")


def test_source_uses_no_other_private_name_of_another_package() -> None:
    """A private name that the package does not define itself is another package's."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    own: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                own.add(node.attr)
    unknown = set()
    for path, tree in trees.items():
        for node in ast.walk(tree):
            used = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                used += [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            unknown |= {
                f"{path.relative_to(SOURCE)}: {name}" for name in used if is_private(name) and name not in own | NAMES
            }
    assert not unknown


def test_every_overridden_method_is_a_seam() -> None:
    missing = set()
    for cls in classes():
        if issubclass(cls, TrainerCallback):
            # Events are there to be defined.
            continue
        bases = [base for base in cls.__mro__[1:] if base.__module__.startswith(UPSTREAM_PACKAGES)]
        for name, value in vars(cls).items():
            is_overridden = any(name in vars(base) for base in bases)
            if is_overridden and not name.startswith("__") and (inspect.isroutine(value) or is_private(name)):
                missing |= {f"{cls.__name__}.{name}"} - {f"{cls.__name__}.{seam}" for seam in NAMES}
    assert not missing


class ChangedTrainer:
    """Stands for a `GRPOTrainer` whose method has other parameters."""

    def _compute_loss(self, model: object, inputs: object, scaler: object) -> None: ...

    def _calculate_rewards(
        self, inputs: object, prompts: object, completions: object, extra: object = None
    ) -> None: ...


@pytest.mark.parametrize(
    ("seam", "message"),
    [
        (
            Seam("stand.In", "_compute_loss", "model, inputs"),
            r"stand.In._compute_loss\(model, inputs\) is needed, but _compute_loss\(model, inputs, scaler\) is installed",
        ),
        (
            Seam("stand.In", "_compute_lose", "model, ..."),
            r"_compute_lose\(model, ...\) is needed, but there is no such",
        ),
        (Seam("stand.In", "_metrics"), "stand.In has no _metrics"),
    ],
)
def test_a_seam_that_does_not_fit_is_named(seam: Seam, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "_load", lambda path: ChangedTrainer)
    with pytest.raises(ImportError, match=message):
        check_installed("1.16.0", [seam])


@pytest.mark.parametrize("parameters", ["inputs, ...", "inputs, prompts, completions, extra"])
def test_parameters_may_follow_where_the_table_says_so(parameters: str) -> None:
    assert Seam("stand.In", "_calculate_rewards", parameters).fits(ChangedTrainer)
    assert not Seam("stand.In", "_calculate_rewards", "inputs, prompt, ...").fits(ChangedTrainer)


def test_an_owner_that_is_gone_is_named() -> None:
    with pytest.raises(ImportError, match="trl.GroupTrainer cannot be found"):
        check_installed("1.16.0", [Seam("trl.GroupTrainer", "train")])


def test_a_newer_trl_that_fits_warns_once_and_an_older_one_is_refused() -> None:
    low, high = TESTED_TRL
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_installed(str(low))
    with pytest.warns(UserWarning, match=rf"trl>={low},<{high}, but trl {high} is installed") as caught:
        check_installed(str(high))
    assert len(caught) == 1
    with pytest.raises(ImportError, match=rf"needs trl>={low}, but trl 1.15.0 is installed"):
        check_installed("1.15.0")


@pytest.mark.parametrize("name", ["quantization_config", "tools", "rollout_func", "environment_factory"])
def test_arguments_without_a_meaning_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"does not take TRL's argument {name}"):
        AlphaGRPOTrainer(None, None, **{name: SimpleNamespace()})


def test_constructor_takes_the_arguments_of_trl_in_their_order() -> None:
    ours, theirs = (list(inspect.signature(cls.__init__).parameters) for cls in (AlphaGRPOTrainer, GRPOTrainer))
    assert ours == theirs
