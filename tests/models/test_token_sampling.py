# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from alphagrpo_ext.models.token_sampling import filter_logits, sample_tokens


class TestSampleTokens:
    """Evenly spread uniform numbers must hit every token as often as its probability says."""

    NUM = 20_000
    LOGITS = 2 * torch.randn(40, generator=torch.Generator().manual_seed(0))

    def sample(self, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        uniforms = (torch.arange(self.NUM) + 0.5) / self.NUM
        shuffled = uniforms[torch.randperm(self.NUM, generator=torch.Generator().manual_seed(0))]
        return sample_tokens(self.LOGITS.expand(self.NUM, -1), shuffled, **kwargs)

    @pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
    @pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (12, 0.6), (100, 1.0)])
    def test_distribution(self, temperature, top_k, top_p):
        probabilities = (self.LOGITS.double() / temperature).softmax(dim=-1)
        order = probabilities.argsort(descending=True).tolist()
        kept = order[: top_k or None]
        mass = probabilities[kept].sum()
        nucleus, total = [], 0.0
        for token in kept:
            if total < top_p:
                nucleus.append(token)
                total += (probabilities[token] / mass).item()
        expected = torch.zeros_like(probabilities)
        expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()

        tokens, log_probs = self.sample(temperature=temperature, top_k=top_k, top_p=top_p)
        frequencies = torch.bincount(tokens, minlength=len(expected)).double() / self.NUM
        torch.testing.assert_close(frequencies, expected, rtol=0, atol=2 / self.NUM)
        assert (frequencies[expected == 0] == 0).all()
        # Filters do not enter the log-probabilities: they are those of the policy.
        torch.testing.assert_close(log_probs.double(), probabilities.log()[tokens], rtol=0, atol=1e-5)

    def test_greedy(self):
        tokens, log_probs = self.sample(temperature=0)
        assert set(tokens.tolist()) == {int(self.LOGITS.argmax())}
        torch.testing.assert_close(log_probs, self.LOGITS.log_softmax(-1).max().expand(self.NUM))

    def test_token_depends_on_its_own_number_alone(self):
        logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
        uniforms = torch.rand(6, generator=torch.Generator().manual_seed(2))
        together, _ = sample_tokens(logits, uniforms, top_p=0.9)
        alone = [sample_tokens(logits[i : i + 1], uniforms[i : i + 1], top_p=0.9)[0] for i in range(6)]
        assert torch.equal(together, torch.cat(alone))

    @pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
    def test_extreme_numbers_take_kept_tokens(self, uniform):
        vocabulary = 1000
        for kept in ([0, 1], [vocabulary // 2], [vocabulary - 2, vocabulary - 1], list(range(100, 900))):
            logits = torch.full((1, vocabulary), -5.0)
            logits[0, kept] = 5 + torch.arange(len(kept)) * 1e-3
            token, _ = sample_tokens(logits, torch.tensor([uniform]), top_k=len(kept))
            assert token.item() in kept

    def test_nucleus_keeps_at_least_one_token(self):
        assert torch.isfinite(filter_logits(self.LOGITS[None], top_p=1e-6)).sum() == 1
