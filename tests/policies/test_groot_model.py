"""GR00T N1.5 as a whole: sizes, caching, training path, errors (conformance: elsewhere)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla.errors import ConfigError, NumericsError, ObservationError
from omega_qvla.modules.step_context import current_step
from omega_qvla.policies.attention import attend
from omega_qvla.policies.groot_n15.action_head import Prefix
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.init import init_weights
from omega_qvla.policies.groot_n15.model import GrootModel

IMAGE_TOKEN, IMAGE_TOKENS = 90, 4
TRUE_PARAMETERS = 2_413_522_880
UNUSED_POOLING_HEAD = 15_238_352


def small_dict() -> dict[str, Any]:
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "model_type": "siglip_vision_model",
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "tie_word_embeddings": True,
    }
    dit = {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 64,
        "output_dim": 40,
        "interleave_self_attention": True,
        "norm_type": "ada_norm",
        "dropout": 0.2,
    }
    vl = {"num_layers": 1, "num_attention_heads": 4, "attention_head_dim": 16, "dropout": 0.2}
    head = {
        "action_dim": 5,
        "action_horizon": 6,
        "backbone_embedding_dim": 64,
        "hidden_size": 40,
        "input_embedding_dim": 48,
        "max_state_dim": 7,
        "max_num_embodiments": 3,
        "max_seq_len": 8,
        "num_target_vision_tokens": 2,
        "noise_s": 0.999,
        "diffusion_model_cfg": dit,
        "vl_self_attention_cfg": vl,
    }
    return {
        "model_type": "gr00t_n1_5",
        "action_dim": 5,
        "action_horizon": 6,
        "hidden_size": 64,
        "torch_dtype": "bfloat16",
        "backbone_cfg": {"select_layer": 2, "project_to_dim": None, "tune_llm": False},
        "action_head_cfg": head,
        "eagle_cfg": {
            "vision_config": vision,
            "text_config": text,
            "image_token_index": IMAGE_TOKEN,
            "force_image_size": 28,
        },
    }


@pytest.fixture(scope="module")
def model() -> GrootModel:
    """Random weights, none of them near zero (`init_weights` alone silences modulations)."""
    built = GrootModel(GrootConfig.from_dict(small_dict()))
    init_weights(built, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return built.eval()


def observations(batch: int, padding: int = 0, seed: int = 2) -> dict[str, Tensor]:
    """One image tile each; observation 0 has `padding` tokens on its left."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, IMAGE_TOKEN, (batch, 12), generator=g)
    ids[:, 5 : 5 + IMAGE_TOKENS] = IMAGE_TOKEN
    mask = torch.ones(batch, 12, dtype=torch.int64)
    mask[0, :padding] = 0
    return {
        "pixel_values": torch.rand(batch, 3, 28, 28, generator=g) * 2 - 1,
        "input_ids": ids,
        "attention_mask": mask,
        "state": torch.randn(batch, 7, generator=g),
        "embodiment_id": torch.arange(batch) % 3,
    }


def noise(count: int, seed: int = 3) -> Tensor:
    return torch.randn(count, 6, 5, generator=torch.Generator().manual_seed(seed))


def one(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """Observation `index` alone, without its padding and without a mask."""
    keep = inputs["attention_mask"][index].bool()
    alone = {k: v[index : index + 1] for k, v in inputs.items()}
    return {**alone, "input_ids": alone["input_ids"][:, keep], "attention_mask": None}


def head_linears(model: GrootModel) -> list[str]:
    return [n for n, m in model.action_head.named_modules() if isinstance(m, nn.Linear)]


def test_true_size() -> None:
    config = GrootConfig()
    with torch.device("meta"):
        model = GrootModel(config)
    count = sum(p.numel() for p in model.parameters())
    assert count == TRUE_PARAMETERS - UNUSED_POOLING_HEAD
    assert len(model.backbone.eagle_model.language_model.model.layers) == 12
    assert {n.split(".")[0] for n in model.state_dict()} == {"backbone", "action_head"}
    assert config.eagle.tokens_per_image == 256


def test_config_round_trip() -> None:
    data = small_dict()
    config = GrootConfig.from_dict(data)
    written = config.to_dict()
    assert GrootConfig.from_dict(written) == config

    def contains(outer: Any, inner: Any) -> bool:
        if isinstance(inner, dict):
            return all(k in outer and contains(outer[k], v) for k, v in inner.items())
        return outer == inner

    assert contains(written, data), "a key of the original config.json was lost"


def test_published_config_has_no_eagle_sizes() -> None:
    written = GrootConfig().to_dict()
    assert "eagle_cfg" not in written
    assert GrootConfig.from_dict(written) == GrootConfig()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model_type",), "gr00t_n1", "model_type"),
        (("action_head_cfg", "input_embedding_dim"), 64, "DiT heads"),
        (("action_head_cfg", "hidden_size"), 32, "output_dim"),
        (("action_head_cfg", "action_horizon"), 9, "exceeds 8 positions"),
        (("action_head_cfg", "diffusion_model_cfg", "positional_embeddings"), "sinusoidal", "pos"),
        (("backbone_cfg", "project_to_dim"), 32, "the head expects 64"),
        (("eagle_cfg", "text_config", "num_key_value_heads"), 3, "divide"),
        (("eagle_cfg", "text_config", "hidden_act"), "gelu", "hidden_act"),
        (("eagle_cfg", "mlp_connector_layers"), 3, "mlp_connector_layers"),
    ],
)
def test_impossible_configs_are_refused(path: tuple[str, ...], value: Any, message: str) -> None:
    data = small_dict()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        GrootConfig.from_dict(data)


def test_more_layers_than_the_language_model_has() -> None:
    data = small_dict()
    data["backbone_cfg"]["select_layer"] = 4
    with pytest.raises(ConfigError, match="select_layer"):
        GrootModel(GrootConfig.from_dict(data))


@torch.no_grad()
def test_a_batch_is_as_each_alone(model: GrootModel) -> None:
    """Other embodiments, other lengths: with padding masked nothing leaks."""
    inputs = observations(3, padding=4)
    together = model.sample_actions(model.encode(**inputs, mask_padding=True), noise(3))
    leaking = model.sample_actions(model.encode(**inputs), noise(3))
    for i in range(3):
        alone = model.sample_actions(model.encode(**one(inputs, i)), noise(3)[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)
    assert (leaking[0] - together[0]).abs().max() > 1e-3, "the reference attends to padding"
    torch.testing.assert_close(leaking[1:], together[1:], atol=2e-5, rtol=0)


@torch.no_grad()
def test_one_embodiment_for_the_whole_batch(model: GrootModel) -> None:
    inputs = observations(3)
    inputs["embodiment_id"] = torch.tensor([2, 2, 2])
    each = model.sample_actions(model.encode(**inputs), noise(3))
    inputs["embodiment_id"] = torch.tensor([2])
    shared = model.sample_actions(model.encode(**inputs), noise(3))
    torch.testing.assert_close(shared, each, atol=2e-5, rtol=0)


@torch.no_grad()
def test_repeat_serves_several_noise_samples(model: GrootModel) -> None:
    inputs, samples = observations(2), noise(6)
    prefix = model.encode(**inputs)
    repeated = prefix.repeat(3)
    assert repeated.batch == 6
    assert repeated.key_values[0][0] is prefix.key_values[0][0]
    buckets = torch.tensor([0, 100, 999, 500, 250, 3])
    velocity = model.velocity(repeated, samples, model.conditioning(buckets))
    for i in range(6):
        alone = model.encode(**one(inputs, i // 3))
        time = model.conditioning(buckets[i : i + 1])
        expected = model.velocity(alone, samples[i : i + 1], time)
        torch.testing.assert_close(velocity[i : i + 1], expected, atol=2e-5, rtol=0)


def test_gradients_reach_every_parameter(model: GrootModel) -> None:
    trained = copy.deepcopy(model)
    prefix = trained.encode(**observations(3, padding=2)).repeat(2)
    buckets = torch.tensor([0, 10, 200, 400, 800, 999])
    velocity = trained.velocity(prefix, noise(6), trained.conditioning(buckets))
    velocity.square().mean().backward()
    for name, parameter in trained.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_which_linears_run_when(model: GrootModel) -> None:
    """Backbone and step-independent layers once and outside steps; the others in each step."""
    steps: dict[str, list[int | None]] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            steps[name] = []

            def note(_m: Any, _i: Any, _o: Any, name: str = name) -> None:
                step = current_step()
                steps[name].append(None if step is None else step.index)

            handles.append(module.register_forward_hook(note))
    model.sample_actions(model.encode(**observations(1)), noise(1), num_steps=3)
    for handle in handles:
        handle.remove()
    once = set(model.step_independent_linears())
    assert once < set(steps)
    for name, seen in steps.items():
        if name in model.unused_linears():
            assert not seen, name
        elif name.startswith("backbone.") or name in once:
            assert seen == [None], name
        else:
            assert seen == [0, 1, 2], name


@torch.no_grad()
def test_linears_can_be_replaced(model: GrootModel) -> None:
    """A replacement without `.weight` (as quantized layers are) gives the same actions."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    replaced = copy.deepcopy(model)
    names = [n for n, m in replaced.named_modules() if isinstance(m, nn.Linear)]
    for name in names:
        parent, _, leaf = name.rpartition(".")
        setattr(replaced.get_submodule(parent), leaf, Wrapped(replaced.get_submodule(name)))
    inputs = observations(2)
    expected = model.sample_actions(model.encode(**inputs), noise(2))
    assert torch.equal(replaced.sample_actions(replaced.encode(**inputs), noise(2)), expected)


@torch.no_grad()
def test_the_last_block_computes_only_action_tokens(model: GrootModel) -> None:
    rows = []
    block = model.action_head.model.transformer_blocks[-1]
    handle = block.ff.register_forward_hook(lambda _m, _i, out: rows.append(out.shape[1]))
    model.sample_actions(model.encode(**observations(1)), noise(1), num_steps=1)
    handle.remove()
    assert rows == [6]


@torch.no_grad()
def test_kept_conditioning_is_the_same(model: GrootModel) -> None:
    prefix: Prefix = model.encode(**observations(1))
    fresh = model.sample_actions(prefix, noise(1), 4)
    kept = model.step_conditioning(4)
    assert torch.equal(model.sample_actions(prefix, noise(1), 4, kept), fresh)
    assert torch.equal(model.sample_actions(prefix, noise(1)), fresh), "4 steps by default"
    with pytest.raises(NumericsError, match="has 4 steps, not 8"):
        model.sample_actions(prefix, noise(1), 8, kept)


@torch.no_grad()
def test_bad_input_is_named(model: GrootModel) -> None:
    inputs = observations(1)
    prefix = model.encode(**inputs)
    with pytest.raises(NumericsError, match="noise has shape"):
        model.sample_actions(prefix, noise(2))
    with pytest.raises(NumericsError, match="at least one denoising step"):
        model.sample_actions(prefix, noise(1), 0)
    inputs["input_ids"][0, 5] = 1
    with pytest.raises(ObservationError, match="3 image placeholders"):
        model.encode(**inputs)


@torch.no_grad()
def test_16_bit_stays_close(model: GrootModel) -> None:
    inputs = observations(2, padding=3)
    expected = model.sample_actions(model.encode(**inputs), noise(2))
    half = copy.deepcopy(model).to(torch.bfloat16)
    actions = half.sample_actions(half.encode(**inputs), noise(2))
    assert actions.dtype == torch.float32
    cosine = torch.cosine_similarity(actions.flatten(1), expected.flatten(1))
    assert cosine.min() > 0.999, cosine


@pytest.mark.parametrize("kind", ["plain", "mask", "causal"])
def test_16_bit_attention(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 5, 8, generator=g).bfloat16()
    k, v = torch.randn(2, 2, 2, 5, 8, generator=g).bfloat16()
    mask = torch.rand(2, 1, 1, 5, generator=g) > 0.4 if kind == "mask" else None
    if mask is not None:
        mask[..., 0] = True
    causal = kind == "causal"
    actual = attend(q, k, v, mask, causal)
    expected = attend(q.float(), k.float(), v.float(), mask, causal)
    torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0)


def test_init_is_reproducible_and_tame() -> None:
    models = [GrootModel(GrootConfig.from_dict(small_dict())) for _ in range(3)]
    for built, seed in zip(models, (0, 0, 1), strict=True):
        init_weights(built, seed)
    first, same, other = (m.state_dict() for m in models)
    assert all(torch.equal(first[k], same[k]) for k in first)
    name = "action_head.model.transformer_blocks.0.attn1.to_q.weight"
    assert not torch.equal(first[name], other[name])
    with torch.no_grad():
        prefix = models[0].encode(**observations(2))
        velocity = models[0].velocity(prefix, noise(2), models[0].step_conditioning(4).at(1))
    assert 0.1 < prefix.vl.std() < 10
    assert velocity.abs().max() < 1
