"""The native pi0.5 apart from the recordings: structure, caching, gradients, dtypes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.errors import NumericsError, ObservationError
from omega_qvla.modules.step_context import Step, current_step
from omega_qvla.policies.pi05.config import GemmaConfig, Pi05Config, SiglipConfig
from omega_qvla.policies.pi05.dtypes import cast_for_inference
from omega_qvla.policies.pi05.init import init_weights
from omega_qvla.policies.pi05.model import Pi05Model, Prefix

CONFIG = Pi05Config(
    vision=SiglipConfig(32, 48, 2, 4, 32, 16),
    vlm=GemmaConfig(64, 3, 96, 4, 2, 16),
    expert=GemmaConfig(32, 3, 64, 4, 2, 16),
    vocab_size=50,
    action_dim=4,
    action_horizon=5,
    max_token_len=7,
)
BATCH = 3
Observation = tuple[list[Tensor], list[Tensor], Tensor, Tensor]


@pytest.fixture
def model() -> Pi05Model:
    model = Pi05Model(CONFIG)
    init_weights(model, seed=0)
    with torch.no_grad():  # every part must have a say, also those that start at zero
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@pytest.fixture
def observation() -> Observation:
    """Three observations: the wrist camera is missing in one, the third slot in all."""
    g = torch.Generator().manual_seed(2)
    images = [torch.rand(BATCH, 3, 32, 32, generator=g) * 2 - 1 for _ in range(3)]
    masks = [torch.tensor(m) for m in ([True] * 3, [True, False, True], [False] * 3)]
    tokens = torch.randint(0, 50, (BATCH, 7), generator=g)
    return images, masks, tokens, torch.arange(7) < torch.tensor([[5], [3], [4]])


def noise(samples: int) -> Tensor:
    return torch.randn(samples, 5, 4, generator=torch.Generator().manual_seed(3))


def test_true_size_has_the_published_parameter_count() -> None:
    data = {"action_dim": 32, "action_horizon": 10}
    data |= {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
    with torch.device("meta"):
        model = Pi05Model(Pi05Config.from_dict(data))
    count = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(count.values()) == 3_353_433_872
    assert sum(n for name, n in count.items() if ".vision_tower." in name) == 412_442_352
    assert sum(n for name, n in count.items() if ".gemma_expert." in name) == 427_932_672
    assert sum(n for name, n in count.items() if ".dense." in name) == 116_505_600


def test_unused_linears_are_those_that_never_run(
    model: Pi05Model, observation: Observation
) -> None:
    ran = set()
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
    model.sample_actions(model.encode_prefix(*observation), noise(BATCH), 2)
    assert set(linears) - ran == set(model.unused_linears())


def test_layers_see_3d_inputs_shared_between_q_k_v_and_the_running_step(
    model: Pi05Model, observation: Observation
) -> None:
    calls: dict[str, list[tuple[Tensor, Step | None]]] = {}

    def record(name: str, x: Tensor) -> None:
        calls.setdefault(name, []).append((x, current_step()))

    stacks = {"prefix": model.language_model.layers[0], "suffix": model.expert.layers[0]}
    for stack, layer in stacks.items():
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and name.endswith("_proj"):
                key = f"{stack}.{name}"
                module.register_forward_pre_hook(lambda _m, x, key=key: record(key, x[0]))
    model.sample_actions(model.encode_prefix(*observation), noise(BATCH), 4)
    for stack, steps in (("prefix", [None]), ("suffix", [Step(s, 4) for s in range(4)])):
        group = {k: v for k, v in calls.items() if k.startswith(stack)}
        assert len(group) == 7
        assert all([step for _, step in v] == steps for v in group.values())
        assert all(x.dim() == 3 for v in group.values() for x, _ in v)
        q, k, v = (group[f"{stack}.self_attn.{n}_proj"] for n in "qkv")
        assert all(a is b is c for (a, _), (b, _), (c, _) in zip(q, k, v, strict=True))
        gate, up = (group[f"{stack}.mlp.{n}_proj"] for n in ("gate", "up"))
        assert all(a is b for (a, _), (b, _) in zip(gate, up, strict=True))


def test_trimming_changes_nothing(model: Pi05Model, observation: Observation) -> None:
    short, long = (model.encode_prefix(*observation, trim=trim) for trim in (True, False))
    assert short.pad_mask.shape == (BATCH, 2 * 4 + 5) and long.pad_mask.shape == (BATCH, 3 * 4 + 7)
    assert torch.equal(short.num_valid, long.num_valid)
    a, b = (model.sample_actions(prefix, noise(BATCH), 3) for prefix in (short, long))
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_masked_inputs_have_no_influence(model: Pi05Model, observation: Observation) -> None:
    images, masks, tokens, lang_mask = observation
    changed = [
        torch.where(mask[:, None, None, None], image, 9.0)
        for image, mask in zip(images, masks, strict=True)
    ]
    other = (changed, masks, tokens.masked_fill(~lang_mask, 7), lang_mask)
    a, b = (
        model.sample_actions(model.encode_prefix(*o), noise(BATCH), 3) for o in (observation, other)
    )
    torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    images[0][0] += 0.5
    c = model.sample_actions(model.encode_prefix(*observation), noise(BATCH), 3)
    assert (a - c)[0].abs().max() > 1e-3 and (a - c)[1:].abs().max() < 1e-5


def test_a_batch_equals_its_observations_one_by_one(
    model: Pi05Model, observation: Observation
) -> None:
    images, masks, tokens, lang_mask = observation
    together = model.sample_actions(model.encode_prefix(*observation), noise(BATCH), 3)
    for i in range(BATCH):
        row = slice(i, i + 1)
        one = model.encode_prefix(
            [x[row] for x in images], [m[row] for m in masks], tokens[row], lang_mask[row]
        )
        assert one.bias is None  # nothing masked is left
        alone = model.sample_actions(one, noise(BATCH)[row], 3)
        torch.testing.assert_close(alone, together[row], atol=1e-5, rtol=0)


def expanded(prefix: Prefix, count: int) -> Prefix:
    """The prefix with its cache really repeated."""

    def rows(x: Tensor) -> Tensor:
        return x.repeat_interleave(count, 0)

    bias = None if prefix.bias is None else rows(prefix.bias)
    keys, values = (tuple(map(rows, t)) for t in (prefix.keys, prefix.values))
    return Prefix(keys, values, rows(prefix.pad_mask), rows(prefix.num_valid), bias)


def test_shared_prefix_equals_a_copied_one_with_gradients(
    model: Pi05Model, observation: Observation
) -> None:
    count, times = 4, torch.linspace(0.001, 1, BATCH * 4)
    results = []
    for share in (lambda p: p.repeat(2).repeat(2), lambda p: expanded(p, count)):
        model.zero_grad()
        prefix = share(model.encode_prefix(*observation))
        v = model.velocity(prefix, noise(BATCH * count), model.conditioning(times))
        v.square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append((v, grads))
    (v1, g1), (v2, g2) = results
    torch.testing.assert_close(v1, v2, atol=1e-5, rtol=0)
    assert set(g1) == set(g2)
    for name in g1:
        torch.testing.assert_close(g1[name], g2[name], atol=1e-5, rtol=1e-3, msg=name)
    without = {n for n, _ in model.named_parameters()} - set(g1)
    last = "paligemma_with_expert.paligemma.model.language_model.layers.2"
    dead = {f"{name}.weight" for name in model.unused_linears()}
    dead |= {f"{last}.post_attention_layernorm.weight", f"{last[:-9]}.norm.weight"}
    assert without == dead


def test_one_time_for_all_equals_the_same_time_each(
    model: Pi05Model, observation: Observation
) -> None:
    prefix = model.encode_prefix(*observation)
    one = model.velocity(prefix, noise(BATCH), model.conditioning(torch.tensor([0.3])))
    each = model.velocity(prefix, noise(BATCH), model.conditioning(torch.full((BATCH,), 0.3)))
    # torch adds in other orders for one row than for three: 1.0e-6 here on AVX2, 1.7e-6 at most in
    # 60 draws of noise and time.
    torch.testing.assert_close(one, each, atol=2e-6, rtol=0)


def test_time_grid_accumulates_in_float32(model: Pi05Model) -> None:
    grid = model.time_grid(10)
    exact = torch.tensor([1 - s / 10 for s in range(10)])
    assert grid.dtype == torch.float32 and 0 < (grid - exact).abs().max() < 1e-6
    assert all(len(model.time_grid(n)) == n for n in (1, 2, 7, 100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inference_keeps_the_sensitive_parts_in_float32(
    model: Pi05Model, observation: Observation, dtype: torch.dtype
) -> None:
    exact = model.sample_actions(model.encode_prefix(*observation), noise(BATCH), 5)
    cast_for_inference(model, dtype)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    assert kinds["time_mlp_in.weight"] == torch.float32
    assert {t for n, t in kinds.items() if ".dense." in n} == {torch.float32}
    assert {t for n, t in kinds.items() if n.endswith("_proj.weight") and "layers" in n} == {dtype}
    prefix = model.encode_prefix(*observation)
    assert prefix.keys[0].dtype == dtype
    actions = model.sample_actions(prefix, noise(BATCH), 5)
    assert actions.dtype == torch.float32
    error = (actions - exact).norm() / exact.norm()
    assert 0 < error < 0.03


def test_wrong_arguments_are_named(model: Pi05Model, observation: Observation) -> None:
    images, masks, tokens, lang_mask = observation
    with pytest.raises(ObservationError, match="image_size"):
        model.encode_prefix([x[..., :30] for x in images], masks, tokens, lang_mask)
    with pytest.raises(ObservationError, match="2 masks"):
        model.encode_prefix(images, masks[:2], tokens, lang_mask)
    with pytest.raises(ObservationError, match="left_wrist_0_rgb"):
        model.encode_prefix([images[0], images[1][:1], images[2]], masks, tokens, lang_mask)
    with pytest.raises(ObservationError, match="bool"):
        model.encode_prefix(images, masks, tokens, lang_mask.long())
    prefix = model.encode_prefix(*observation)
    with pytest.raises(NumericsError, match="repeat"):
        model.velocity(prefix, noise(2 * BATCH), model.conditioning(torch.tensor([0.3])))


def test_initial_weights_follow_the_seed_and_can_learn(observation: Observation) -> None:
    model, same, other = (Pi05Model(replace(CONFIG)) for _ in range(3))
    for m, seed in ((model, 5), (same, 5), (other, 6)):
        init_weights(m, seed)
    a, b, c = (m.state_dict() for m in (model, same, other))
    assert all(torch.equal(a[k], b[k]) for k in a) and any(not torch.equal(a[k], c[k]) for k in a)
    times = torch.linspace(0.1, 1, BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        v = model.velocity(
            model.encode_prefix(*observation), noise(BATCH), model.conditioning(times)
        )
        loss = (v - noise(BATCH).roll(1, 0)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_autocast_keeps_time_and_velocity_exact(model: Pi05Model, observation: Observation) -> None:
    exact = model.conditioning(torch.tensor([0.3])).modulations[0].scale
    with torch.autocast("cpu", torch.bfloat16):
        scale = model.conditioning(torch.tensor([0.3])).modulations[0].scale
        v = model.velocity(
            model.encode_prefix(*observation), noise(BATCH), model.conditioning(torch.ones(1))
        )
    assert torch.equal(scale, exact)
    assert v.dtype == torch.float32
