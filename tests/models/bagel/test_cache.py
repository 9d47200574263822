# SPDX-License-Identifier: Apache-2.0

"""The cache gives every sample what it would have alone, and sampling allocates no keys and values."""

import pytest
import torch

from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.trajectory import TextSegment


CONFIG = DenoisingConfig(num_timesteps=7, window_start=1, window_size=3)


@pytest.mark.invariant
class TestCache:
    MAX_NEW_TOKENS = 10

    @pytest.fixture
    def contexts(self, rollout, tiny_bagel) -> list:
        return [trajectory.segments[:-2] for trajectory in rollout(tiny_bagel, "edit", CONFIG)[::2]]

    def run(self, model, contexts, group_size, uniforms, latents):
        """Sample a text for every sample, and predict a velocity after it."""
        cache = model.prefill(contexts, group_size, capacity=self.MAX_NEW_TOKENS + 2 + model.image_slots((2, 3)))
        text = model.sample_text(cache, uniforms)
        return cache, text, model.predict_velocity(cache, latents, (2, 3), torch.tensor(0.7))

    def test_samples_do_not_depend_on_each_other(self, tiny_bagel, contexts):
        """Groups share a prefix, and texts end at different lengths. Every sample is as if it were alone."""
        group_size, generator = 4, torch.Generator().manual_seed(0)
        num_samples = group_size * len(contexts)
        uniforms = torch.rand(num_samples, self.MAX_NEW_TOKENS, generator=generator)
        latents = torch.randn(num_samples, 6, tiny_bagel.config.latent_channels, generator=generator)
        cache, text, velocity = self.run(tiny_bagel, contexts, group_size, uniforms, latents)
        assert set(text.ended) == {True, False}
        assert len({len(ids) for ids in text.token_ids}) > 2
        for i in range(num_samples):
            context, sample = contexts[i // group_size], slice(i, i + 1)
            cache_alone, text_alone, velocity_alone = self.run(
                tiny_bagel, [context], 1, uniforms[sample], latents[sample]
            )
            assert text.token_ids[i] == text_alone.token_ids[0]
            assert text.ended[i] == text_alone.ended[0]
            torch.testing.assert_close(text.log_probs[i], text_alone.log_probs[0], rtol=0, atol=1e-5)
            assert cache.positions[i] == cache_alone.positions[0]
            torch.testing.assert_close(velocity[sample], velocity_alone, rtol=0, atol=2e-5)

    def test_head_is_a_view(self, tiny_bagel, contexts):
        cache = tiny_bagel.prefill(contexts, group_size=2, capacity=4)
        head = cache.head(2)
        assert (head.num_rows, head.group_size) == (2, 2)
        for name in ("prefix_keys", "prefix_values", "keys", "values"):
            for part, whole in zip(getattr(head, name), getattr(cache, name), strict=True):
                assert part.data_ptr() == whole.data_ptr()
        for name in ("blocks", "prefix_blocks"):
            assert getattr(head, name).data_ptr() == getattr(cache, name).data_ptr()
        with pytest.raises(ValueError, match="3 rows"):
            cache.head(3)

    def test_steps_allocate_no_keys_and_values(self, tiny_bagel, contexts):
        """Neither decoding nor prediction replaces the tensors of the cache."""
        cache = tiny_bagel.prefill(contexts, group_size=2, capacity=self.MAX_NEW_TOKENS + 2 + 8)
        storage = [[t.data_ptr() for t in getattr(cache, name)] for name in ("prefix_keys", "keys", "values")]
        tiny_bagel.sample_text(cache, torch.full((4, self.MAX_NEW_TOKENS), 0.5))
        latents = torch.zeros(4, 6, tiny_bagel.config.latent_channels)
        tiny_bagel.predict_velocity(cache, latents, (2, 3), torch.tensor(0.7))
        assert storage == [[t.data_ptr() for t in getattr(cache, n)] for n in ("prefix_keys", "keys", "values")]

    def test_all_contexts_empty(self, tiny_bagel):
        """The prompt-dropped branch of text-to-image is an empty context."""
        cache = tiny_bagel.prefill([[], []], capacity=8)
        beside = tiny_bagel.prefill([[], [TextSegment([1, 2, 3])]], capacity=8)
        latents = torch.randn(2, 6, tiny_bagel.config.latent_channels, generator=torch.Generator().manual_seed(0))
        velocity = tiny_bagel.predict_velocity(cache, latents, (2, 3), torch.tensor(0.7))
        expected = tiny_bagel.predict_velocity(beside, latents, (2, 3), torch.tensor(0.7))
        torch.testing.assert_close(velocity[0], expected[0], rtol=0, atol=2e-5)
        assert not torch.allclose(velocity[1], expected[1], atol=1e-2)
