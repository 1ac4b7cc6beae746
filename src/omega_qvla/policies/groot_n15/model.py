"""GR00T N1.5: the backbone and the action head under the original checkpoint's names."""

from __future__ import annotations

from torch import Tensor, nn

from omega_qvla.modules.captured import Captured
from omega_qvla.policies.groot_n15.action_head import ActionHead, Prefix
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.dit import StepConditioning
from omega_qvla.policies.groot_n15.eagle import EagleBackbone


class GrootModel(nn.Module):
    """Images, token ids, state and noise to an action chunk (all normalized).

    Parameter names are those of the published checkpoint, less its unused vision pooling head
    and its language-model head (tied to the embedding and never evaluated).
    """

    def __init__(self, config: GrootConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = EagleBackbone(config.eagle, config.backbone)
        self.action_head = ActionHead(config.action_head)
        self.captured: Captured | None = None

    def fuse(self) -> None:
        """Repeat what was done before with the same prompt from now on."""
        self.captured = Captured()

    def encode(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        state: Tensor,
        embodiment_id: Tensor,
        mask_padding: bool = False,
    ) -> Prefix:
        """Everything that depends on the observation alone.

        Args:
            pixel_values: [tiles, 3, H, W] in [-1, 1], the batch's tiles in order.
            input_ids: int64 [B, L].
            attention_mask: [B, L], nonzero where a token is real; None: all are, which saves
                building a mask.
            state: [B, 1, S] or [B, S].
            embodiment_id: int64 [B], or [1] if the whole batch is one embodiment (cheaper).
            mask_padding: keep the action head from attending to padding. The reference lets it
                leak (the default here); with True a padded batch gives each observation the
                actions that it gets alone.
        """
        if self.captured is None or attention_mask is not None or embodiment_id.numel() != 1:
            features = self.backbone(pixel_values, input_ids, attention_mask)
            mask = attention_mask if mask_padding else None
            return self.encode_features(features, state, embodiment_id, mask)

        def encode(pixel_values: Tensor, state: Tensor) -> tuple[Tensor, ...]:
            features = self.backbone(pixel_values, input_ids)
            prefix = self.encode_features(features, state, embodiment_id)
            return prefix.vl, prefix.state_features, *prefix.projected

        # The prompt is part of the key: its embeddings are constants of the capture.
        key = (tuple(map(tuple, input_ids.tolist())), int(embodiment_id))
        vl, state_features, *projected = self.captured(self, encode, pixel_values, state, key=key)
        key_values = self.action_head.pair_up(projected)
        return self.action_head.prefix(vl, state_features, key_values, embodiment_id)

    def encode_features(
        self,
        features: Tensor,
        state: Tensor,
        embodiment_id: Tensor,
        feature_mask: Tensor | None = None,
    ) -> Prefix:
        """`encode` from backbone features; see `ActionHead.encode_features`."""
        return self.action_head.encode_features(features, state, embodiment_id, feature_mask)

    def step_conditioning(self, num_steps: int) -> StepConditioning:
        """Time conditioning of all steps; see `ActionHead.step_conditioning`."""
        return self.action_head.step_conditioning(num_steps)

    def conditioning(self, buckets: Tensor) -> StepConditioning:
        """Time conditioning of buckets int64 [N] (training: one per entry of x_t)."""
        return self.action_head.conditioning(buckets)

    def velocity(self, prefix: Prefix, x_t: Tensor, conditioning: StepConditioning) -> Tensor:
        """Velocity [N, H, A] at x_t [N, H, A]; see `ActionHead.velocity`."""
        return self.action_head.velocity(prefix, x_t, conditioning)

    def sample_actions(
        self,
        prefix: Prefix,
        noise: Tensor,
        num_steps: int | None = None,
        conditioning: StepConditioning | None = None,
    ) -> Tensor:
        """Actions [B, H, A] from noise [B, H, A]; see `ActionHead.sample_actions`."""
        return self.action_head.sample_actions(prefix, noise, num_steps, conditioning)

    def step_independent_linears(self) -> tuple[str, ...]:
        """Full names of the action head's linear layers that run outside `denoising_step`."""
        return tuple(f"action_head.{n}" for n in self.action_head.step_independent_linears())

    def unused_linears(self) -> tuple[str, ...]:
        """Full names of linear layers that inference never runs: none."""
        return ()
