# SPDX-License-Identifier: Apache-2.0

"""Scores of tokens in chunks: those of the plain log-softmax, its gradient, and less memory."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models import token_scores
from alphagrpo_ext.models.bagel import BagelModel
from alphagrpo_ext.models.bagel.network import BagelHead
from alphagrpo_ext.models.token_scores import score_tokens


HIDDEN, VOCAB, TOKENS = 16, 50, 11
GUIDANCE = GuidanceConfig(text_scale=1.0)


def plain(
    head: torch.nn.Linear, states: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    distribution = torch.distributions.Categorical(logits=head(states).float() / temperature)
    return distribution.log_prob(targets), distribution.entropy()


def make(dtype: torch.dtype = torch.float32) -> tuple[BagelHead, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = BagelHead(HIDDEN, VOCAB, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator))
    states = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return head.to(dtype), states, torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def gradients(
    scores: tuple[torch.Tensor, torch.Tensor], head: BagelHead, states: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(0.5, 1.5, TOKENS)
    loss = (weights * scores[0]).sum() + (weights.flip(0) * scores[1]).sum()
    return torch.autograd.grad(loss, (head.weight, states))


@pytest.mark.parametrize("max_logits", [1, VOCAB, 3 * VOCAB, TOKENS * VOCAB])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_scores_and_gradient_are_those_of_the_plain_softmax(max_logits: int, temperature: float) -> None:
    head, states, targets = make()
    expected = plain(head, states, targets, temperature)
    actual = score_tokens(head, states, targets, VOCAB, temperature, max_logits)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(actual, head, states), gradients(expected, head, states), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_scores_of_bf16_states_are_fp32() -> None:
    head, states, targets = make(torch.bfloat16)
    log_probs, entropies = score_tokens(head, states, targets, VOCAB, max_logits=2 * VOCAB)
    assert log_probs.dtype == entropies.dtype == torch.float32
    # Probabilities of a bf16 softmax do not sum to 1 as closely.
    every = [score_tokens(head, states, torch.full_like(targets, i), VOCAB)[0] for i in range(VOCAB)]
    torch.testing.assert_close(torch.stack(every).exp().sum(dim=0), torch.ones(TOKENS), rtol=0, atol=1e-5)
    gradients((log_probs, entropies), head, states)


def test_mixed_precision_is_the_same_in_forward_and_backward() -> None:
    head, states, targets = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(head, states, targets, 1.0)
        actual = score_tokens(head, states, targets, VOCAB, max_logits=2 * VOCAB)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=1e-5)
    for a, b in zip(gradients(actual, head, states), gradients(expected, head, states), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_no_token() -> None:
    head, states, _ = make()
    log_probs, entropies = head(states[:0], torch.zeros(0, dtype=torch.long))
    assert log_probs.shape == entropies.shape == (0,)


def test_only_one_chunk_is_kept() -> None:
    """Bytes that the backward is given, apart from weights, states and targets."""

    def kept(max_logits: int) -> int:
        head, states, targets = make()
        known = {t.untyped_storage().data_ptr() for t in (head.weight, states, targets)}
        sizes = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = score_tokens(head, states, targets, VOCAB, max_logits=max_logits)
        assert scores[0].requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in known)

    assert kept(TOKENS * VOCAB) >= 2 * TOKENS * VOCAB * 4
    assert kept(VOCAB) < VOCAB * 4


@pytest.mark.parametrize("adapted_head", [False, True])
def test_forward_of_the_model_in_chunks(
    tiny_bagel: BagelModel, rollout: Callable, monkeypatch: pytest.MonkeyPatch, adapted_head: bool
) -> None:
    trajectories = rollout(tiny_bagel, "think")
    model = tiny_bagel
    if adapted_head:
        model = get_peft_model(tiny_bagel, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    batch = tiny_bagel.pack(trajectories, GUIDANCE)
    results = []
    for max_logits in (token_scores.MAX_LOGITS, 24):
        # The default of the argument is bound where the function is defined.
        monkeypatch.setattr(score_tokens, "__defaults__", (1.0, max_logits))
        model.zero_grad()
        output = model(**batch.inputs, temperature=0.8)
        (output.log_probs.sum() + output.entropies.square().sum() + output.velocities.square().sum()).backward()
        results.append((output, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (whole, expected), (chunked, actual) = results
    torch.testing.assert_close(chunked.log_probs, whole.log_probs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(chunked.entropies, whole.entropies, rtol=1e-5, atol=1e-6)
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1), msg=name
        )
