"""The flow-matching action head: features and state in, action chunk out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from omega_qvla.errors import NumericsError, StepError
from omega_qvla.kernels import rows
from omega_qvla.modules.captured import Captured
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.policies.groot_n15.blocks import KeyValue
from omega_qvla.policies.groot_n15.config import ActionHeadConfig
from omega_qvla.policies.groot_n15.dit import DiT, StepConditioning
from omega_qvla.policies.groot_n15.embodiment import ActionEncoder, CategoryMLP, CategoryWeights
from omega_qvla.policies.groot_n15.vl_self_attention import VLSelfAttention

# Of the action encoder and of the decoder.
Selected = tuple[tuple[CategoryWeights, ...], tuple[CategoryWeights, CategoryWeights]]


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

    @property
    def projected(self) -> list[Tensor]:
        """Keys and values of the cross blocks in turn."""
        return [tensor for pair in self.key_values if pair is not None for tensor in pair]

    def repeat(self, count: int) -> Prefix:
        """Serve `count` noise samples per observation (as repeat_interleave along the batch).

        Nothing is recomputed, and features, keys and weights are shared, not copied: they keep
        the batch B of the observations.
        """
        states = self.state_features.repeat_interleave(count, dim=0)
        return replace(self, state_features=states, repeats=self.repeats * count)


class ActionHead(nn.Module):
    """The checkpoint's `action_head.`."""

    fast = False

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
        self.captured: Captured | None = None
        self._weights: dict[int, Selected] = {}
        self.position_embedding = (
            nn.Embedding(config.max_seq_len, width) if config.add_pos_embed else None
        )

    def fuse(self) -> None:
        """Repeat the steps that were taken before, for as many features, from now on."""
        self.captured = Captured()
        self._weights.clear()

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
        state_features = self.state_encoder(state.to(self.dtype), embodiment_id)
        key_values = self.model.cross_key_values(vl)
        return self.prefix(vl, state_features, key_values, embodiment_id, mask)

    def prefix(
        self,
        vl: Tensor,
        state_features: Tensor,
        key_values: Sequence[KeyValue | None],
        embodiment_id: Tensor,
        mask: Tensor | None = None,
    ) -> Prefix:
        """What was computed of the observation, and the weights of its embodiment."""
        encoder, decoder = self._selected(embodiment_id)
        return Prefix(vl, state_features, tuple(key_values), encoder, decoder, embodiment_id, mask)

    def _selected(self, embodiment_id: Tensor) -> Selected:
        """Weights of the action encoder and decoder; kept where they are not to change."""
        keep = self.captured is not None and embodiment_id.numel() == 1
        if keep and not torch.is_grad_enabled():
            known = self._weights.get(int(embodiment_id))
            if known is None:
                known = self._weights[int(embodiment_id)] = self._select(embodiment_id)
            return known
        return self._select(embodiment_id)

    def _select(self, embodiment_id: Tensor) -> Selected:
        return self.action_encoder.select(embodiment_id), self.action_decoder.select(embodiment_id)

    def pair_up(self, projected: Sequence[Tensor]) -> tuple[KeyValue | None, ...]:
        """Keys and values in turn (`Prefix.projected`), as each block takes them."""
        one = iter(projected)
        return tuple((next(one), next(one)) if b.cross else None for b in self.model.blocks)

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
            positions = self.position_embedding.weight[: x_t.shape[1]]
            placed = None
            if self.fast:
                placed = rows.residual(actions, positions.expand(actions.shape).contiguous())
            actions = actions + positions if placed is None else placed
        future = self.future_tokens.weight.expand(prefix.batch, -1, -1)
        return rows.concatenated(prefix.state_features, future, actions)

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
        shared = prefix.vl_mask is None and prefix.embodiment_id.numel() == 1
        if self.captured is None or times is not self.kept or not shared:
            return self._integrate(prefix, noise, times)

        def integrate(noise: Tensor, state_features: Tensor, *projected: Tensor) -> Tensor:
            key_values = self.pair_up(projected)
            same = replace(prefix, state_features=state_features, key_values=key_values)
            return self._integrate(same, noise, times)

        key = ("actions", id(times), int(prefix.embodiment_id), prefix.repeats)
        inputs = (noise, prefix.state_features, *prefix.projected)
        actions: Tensor = self.captured(self, integrate, *inputs, key=key)
        return actions

    def _integrate(
        self, prefix: Prefix, noise: Tensor, times: Sequence[StepConditioning]
    ) -> Tensor:
        x, steps = noise, len(times)
        fast = self.fast and x.is_cpu and x.dtype == torch.float32
        share = torch.full((1, 1, x.shape[-1]), 1.0 / steps) if fast else None
        for step, time in enumerate(times):
            with denoising_step(step, steps):
                velocity = self.velocity(prefix, x, time).to(x.dtype)
                done = None if share is None else rows.residual(x, velocity, share)
                x = x + velocity / steps if done is None else done
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
