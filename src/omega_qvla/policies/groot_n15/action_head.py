"""The flow-matching action head: features and state in, action chunk out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from omega_qvla.errors import NumericsError, StepError
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.policies.groot_n15.blocks import KeyValue
from omega_qvla.policies.groot_n15.config import ActionHeadConfig
from omega_qvla.policies.groot_n15.dit import DiT, StepConditioning
from omega_qvla.policies.groot_n15.embodiment import ActionEncoder, CategoryMLP, CategoryWeights
from omega_qvla.policies.groot_n15.vl_self_attention import VLSelfAttention


@dataclass(frozen=True)
class Prefix:
    """All that depends on the observation alone, computed once and used in every step.

    Attributes:
        vl: [B, L, D], features after vlln and vl_self_attention.
        state_features: [B * repeats, 1, width].
        key_values: per DiT block, (K, V) of `vl`, or None for a self-attention block.
        encoder, decoder: action-encoder and decoder weights of the running embodiments.
        embodiment_id: int64 [B], or [1] if the batch shares one.
        vl_mask: bool [B, 1, 1, L] or None, which VL features may be attended.
        repeats: noise samples per observation; consecutive entries of x_t share one.
    """

    vl: Tensor
    state_features: Tensor
    key_values: tuple[KeyValue | None, ...]
    encoder: tuple[CategoryWeights, ...]
    decoder: tuple[CategoryWeights, CategoryWeights]
    embodiment_id: Tensor
    vl_mask: Tensor | None = None
    repeats: int = 1

    @property
    def batch(self) -> int:
        """Entries that x_t must have: observations times repeats."""
        return self.state_features.shape[0]

    def repeat(self, count: int) -> Prefix:
        """Serve `count` noise samples per observation (as repeat_interleave along the batch).

        Nothing is recomputed, and features, keys and weights are shared, not copied: they keep
        the batch B of the observations.
        """
        states = self.state_features.repeat_interleave(count, dim=0)
        return replace(self, state_features=states, repeats=self.repeats * count)


class ActionHead(nn.Module):
    """The checkpoint's `action_head.`."""

    def __init__(self, config: ActionHeadConfig) -> None:
        super().__init__()
        self.config = config
        kinds, width = config.max_num_embodiments, config.input_embedding_dim
        hidden, features = config.hidden_size, config.backbone_embedding_dim
        self.model = DiT(config.diffusion, hidden)
        self.state_encoder = CategoryMLP(kinds, config.max_state_dim, hidden, width)
        self.action_encoder = ActionEncoder(kinds, config.action_dim, width)
        self.action_decoder = CategoryMLP(kinds, hidden, hidden, config.action_dim)
        self.future_tokens = nn.Embedding(config.num_target_vision_tokens, width)
        self.vlln = nn.LayerNorm(features, eps=1e-5) if config.use_vlln else None
        self.vl_self_attention = (
            VLSelfAttention(config.vl_self_attention) if config.use_vlln else None
        )
        self.baked: StepConditioning | None = None
        self.kept: tuple[StepConditioning, ...] | None = None
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, width) if config.add_pos_embed else None
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.future_tokens.weight.dtype

    def encode_features(
        self,
        features: Tensor,
        state: Tensor,
        embodiment_id: Tensor,
        feature_mask: Tensor | None = None,
    ) -> Prefix:
        """The observation's part of the computation, once for all denoising steps.

        Args:
            features: [B, L, D] from the backbone.
            state: [B, 1, S] or [B, S].
            embodiment_id: int64 [B], or [1] if the whole batch is one embodiment (cheaper).
            feature_mask: [B, L], nonzero where a feature may be attended. The reference has
                none: padding of a batch leaks into its actions. None is the reference's way.
        """
        mask = None if feature_mask is None else feature_mask.bool()[:, None, None, :]
        vl = features.to(self.dtype)
        if self.vlln is not None and self.vl_self_attention is not None:
            vl = self.vl_self_attention(self.vlln(vl), mask)
        state = state[:, None] if state.dim() == 2 else state
        return Prefix(
            vl=vl,
            state_features=self.state_encoder(state.to(self.dtype), embodiment_id),
            key_values=self.model.cross_key_values(vl),
            encoder=self.action_encoder.select(embodiment_id),
            decoder=self.action_decoder.select(embodiment_id),
            embodiment_id=embodiment_id,
            vl_mask=mask,
        )

    def buckets(self, num_steps: int) -> Tensor:
        """Time bucket of each step, int64 [num_steps] on the CPU (step s is at t = s / n)."""
        if num_steps < 1:
            raise NumericsError(f"num_steps is {num_steps}; at least one denoising step is needed")
        scale = self.config.num_timestep_buckets
        return torch.tensor([int(s / float(num_steps) * scale) for s in range(num_steps)])

    def conditioning(self, buckets: Tensor) -> StepConditioning:
        """Time conditioning of the buckets int64 [N]; depends on the weights alone.

        Raises:
            StepError: it is baked (stored, its layers left out), for other buckets.
        """
        if self.baked is not None:
            return self._baked_conditioning(self.baked, buckets)
        return self.model.conditioning(buckets, self.dtype)

    @staticmethod
    def _baked_conditioning(baked: StepConditioning, buckets: Tensor) -> StepConditioning:
        if not torch.equal(buckets, baked.buckets):
            raise StepError(
                f"this policy was baked for {len(baked.buckets)} denoising steps and was asked "
                f"for {len(buckets)} times, not those; bundle it anew with other --bake-steps, "
                "or none"
            )
        return baked

    def step_conditioning(self, num_steps: int) -> StepConditioning:
        """Time conditioning of all steps of a trajectory at once; `.at(s)` is one step's."""
        device = self.future_tokens.weight.device
        return self.conditioning(self.buckets(num_steps).to(device))

    def step_conditionings(self, num_steps: int) -> tuple[StepConditioning, ...]:
        """Time conditioning of each step, kept where `keep_conditioning` did so."""
        if self.kept is not None and len(self.kept) == num_steps:
            return self.kept
        times = self.step_conditioning(num_steps)
        return tuple(times.at(s) for s in range(num_steps))

    def keep_conditioning(self) -> None:
        """Compute the conditioning of the usual steps once and for all. The weights that it
        depends on must not change afterwards."""
        steps = self.config.num_inference_timesteps
        if self.baked is None or len(self.baked.buckets) == steps:
            self.kept = None
            encoder = self.action_encoder
            self.kept = tuple(
                replace(one, time=encoder.time_parts(one.tau))
                for one in self.step_conditionings(steps)
            )

    def tokens(
        self, prefix: Prefix, x_t: Tensor, tau: Tensor, time: Tensor | None = None
    ) -> Tensor:
        """[state | future | action] tokens [N, 1 + F + H, width] of x_t [N, H, A].

        tau, time: see `StepConditioning`.
        """
        if time is not None and time.shape[0] > 1:
            time = time[prefix.embodiment_id]
        actions = ActionEncoder.apply_selected(x_t.to(self.dtype), tau, prefix.encoder, time)
        if self.position_embedding is not None:
            actions = actions + self.position_embedding.weight[: x_t.shape[1]]
        future = self.future_tokens.weight.expand(prefix.batch, -1, -1)
        return torch.cat([prefix.state_features, future, actions], dim=1)

    def velocity(self, prefix: Prefix, x_t: Tensor, conditioning: StepConditioning) -> Tensor:
        """The flow's velocity [N, H, A] (towards the data) at x_t [N, H, A].

        `conditioning` is of one time for all (`step_conditioning(n).at(s)`), or of one time per
        entry of x_t (`conditioning(buckets [N])`, for training).
        """
        tokens = self.tokens(prefix, x_t, conditioning.tau, conditioning.time)
        hidden = self.model(
            tokens, prefix.key_values, conditioning, prefix.vl_mask, keep=x_t.shape[1]
        )
        return CategoryMLP.apply_selected(hidden, prefix.decoder)

    def sample_actions(
        self,
        prefix: Prefix,
        noise: Tensor,
        num_steps: int | None = None,
        conditioning: StepConditioning | None = None,
    ) -> Tensor:
        """Integrate the flow from noise (t = 0) to actions (t = 1) by Euler steps.

        Args:
            noise: [B, H, A]; its dtype (float32) is that of the running state and the result.
            num_steps: the configuration's `num_inference_timesteps` by default.
            conditioning: `step_conditioning(num_steps)`, if the caller keeps it.

        Raises:
            NumericsError: noise, prefix and configuration disagree in shape.
        """
        steps = self.config.num_inference_timesteps if num_steps is None else num_steps
        expected = (prefix.batch, self.config.action_horizon, self.config.action_dim)
        if tuple(noise.shape) != expected:
            raise NumericsError(f"noise has shape {tuple(noise.shape)}, expected {expected}")
        if conditioning is not None and conditioning.buckets.shape[0] != steps:
            have = conditioning.buckets.shape[0]
            raise NumericsError(f"conditioning has {have} steps, not {steps}")
        times = (
            self.step_conditionings(steps)
            if conditioning is None
            else [conditioning.at(step) for step in range(steps)]
        )
        x = noise
        for step in range(steps):
            with denoising_step(step, steps):
                x = x + self.velocity(prefix, x, times[step]).to(x.dtype) / steps
        return x

    def step_independent_linears(self) -> tuple[str, ...]:
        """Names of the `nn.Linear`-like modules that run outside `denoising_step`.

        Once per observation: vl_self_attention and the cross blocks' to_k and to_v. Once per
        trajectory: everything that turns time into modulation.
        """
        names = [
            f"vl_self_attention.{name}"
            for name, module in (self.vl_self_attention or nn.Module()).named_modules()
            if hasattr(module, "in_features")
        ]
        for i, block in enumerate(self.model.blocks):
            here = f"model.transformer_blocks.{i}"
            names.append(f"{here}.norm1.linear")
            if block.cross:
                names += [f"{here}.attn1.to_k", f"{here}.attn1.to_v"]
        embedder = "model.timestep_encoder.timestep_embedder"
        return (*names, f"{embedder}.linear_1", f"{embedder}.linear_2", "model.proj_out_1")
