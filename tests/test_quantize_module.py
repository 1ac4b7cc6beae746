"""`quantize_` on a module that nobody here wrote (or so it looks)."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from omega_qvla import attach_pack, quantize_
from omega_qvla.config import Recipe, Scheme, SideRecipe, WeightScheme, preset
from omega_qvla.errors import CalibrationError, ConfigError, PackError, RecipeError, StepError
from omega_qvla.modules.step_context import denoising_step
from omega_qvla.pack.reader import read_pack
from omega_qvla.pack.verify import verify_pack
from omega_qvla.policies.foreign import ForeignLinear, StepCounter
from omega_qvla.quantize import Progress
from policies.stranger import BACKBONE, HEAD, STEPS, Stranger, calibrate, inputs

PAPER, OMEGA = preset("omega-paper"), preset("omega")
REGEXES = {"backbone": BACKBONE, "action_head": HEAD}
INJECT = {"head": r"^flow\.inject$"}


@torch.no_grad()
def act(policy: nn.Module, seed: int = 50) -> Tensor:
    obs, noise = inputs(seed)
    action: Tensor = policy(obs=obs, noise=noise)["action"]
    return action


def drift(policy: nn.Module, reference: nn.Module) -> float:
    expected = act(reference)
    moved = expected - inputs(50)[1]
    return float((act(policy) - expected).norm() / moved.norm())


def quantized(recipe: Recipe = PAPER, **options: Any) -> tuple[Stranger, Any]:
    policy = Stranger()
    return policy, quantize_(policy, recipe, lambda: calibrate(policy), **REGEXES, **options)


def test_layers_are_replaced_in_place_and_act_alike() -> None:
    policy, attached = quantized(OMEGA, **INJECT)
    assert attached.module is policy
    replaced = {n for n, m in policy.named_modules() if isinstance(m, ForeignLinear)}
    # 2 blocks x 5 layers + 1 shared, and 2 blocks x 4; keys and values of the head stay.
    assert replaced == set(attached.layers) and len(replaced) == 11 + 8
    assert 0 < drift(policy, Stranger()) < 0.35


def test_a_shared_layer_is_replaced_wherever_it_is() -> None:
    policy, attached = quantized(OMEGA, **INJECT)
    first, second = (block.mixer.mixed for block in policy.tower["see"])
    assert isinstance(first, ForeignLinear) and first is second
    assert sum("tower" in name and "mixed" in name for name in attached.layers) == 1


def test_steps_are_counted_by_the_head_and_kept_running() -> None:
    policy, attached = quantized(PAPER, **INJECT)
    inside = attached.layers["flow.trunk.0.mixer.w_query"]
    outside = attached.layers["tower.see.0.mixer.w_query"]
    assert inside.num_steps == STEPS and outside.num_steps is None
    assert inside.act_scale is not None and inside.act_scale.shape[0] == STEPS
    assert not torch.equal(inside.act_scale[0], inside.act_scale[1])
    assert 0 < drift(policy, Stranger()) < 1.0
    with pytest.raises(StepError, match=r"w_query.*denoising step"):
        policy.flow["trunk"][0](tokens=torch.zeros(1, 2, 32))


def test_the_right_rows_are_used() -> None:
    """The counted steps give what the caller's own steps give, bit for bit."""
    counted, attached = quantized(PAPER, **INJECT)
    told = Telling()
    quantize_(told, PAPER, lambda: calibrate(told), **REGEXES)
    assert torch.equal(act(counted), act(told))
    assert attached.steps is not None and attached.steps.counts == []


class Telling(Stranger):
    """One that says its steps itself."""

    def act(self, obs: dict[str, Tensor], noise: Tensor) -> Tensor:
        steps, self.steps = self.steps, 1
        tokens, x = obs["tokens"], noise
        for block in self.tower["see"]:
            tokens = block(tokens=tokens)
        for i in range(steps):
            with denoising_step(i, steps):
                h = self.flow["inject"](x) + i / steps
                for block in self.flow["trunk"]:
                    h = block(tokens=h, memory=tokens)
                x = x + self.flow["emit"](h) / steps
        self.steps = steps
        return x


def test_head_and_caller_cannot_both_say() -> None:
    told = Telling()
    with pytest.raises(StepError, match="leave out `head`"):
        quantize_(told, PAPER, lambda: calibrate(told), **REGEXES, **INJECT)


def test_the_pack_goes_into_a_fresh_copy(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    policy, _ = quantized(PAPER, **INJECT, out=path)
    fresh = Stranger()
    again = attach_pack(fresh, path)
    assert torch.equal(act(fresh), act(policy))
    assert again.steps is not None and again.steps.head == "flow.inject"
    assert all(check.passed for check in verify_pack(path))
    manifest = read_pack(path).manifest
    assert manifest.family == "foreign" and manifest.calibration["count"] == 4
    assert manifest.config["module"].endswith("stranger.Stranger")
    with pytest.raises(PackError, match="already has quantized layers"):
        attach_pack(fresh, path)
    with pytest.raises(PackError, match=r"other weights.*flow"):
        attach_pack(Stranger(seed=1), path)


def test_a_build_repeats_to_the_byte(tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantized(OMEGA, out=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


class Killed(BaseException):
    """Like SIGKILL: nothing catches it."""


def kill_after(layers: int) -> Any:
    def progress(event: Progress) -> None:
        if event.done == layers:
            raise Killed

    return progress


def test_a_build_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "p"
    quantized(OMEGA, out=whole, **INJECT)
    for reached in (1, 7, 18):
        policy = Stranger()
        with pytest.raises(Killed):
            quantize_(
                policy, OMEGA, lambda p=policy: calibrate(p), **REGEXES, **INJECT, out=out,
                progress=kill_after(reached),
            )  # fmt: skip
        assert not any(isinstance(m, ForeignLinear) for m in policy.modules())
        assert len(list((tmp_path / "p.partial").glob("layer-*"))) == reached
    events: list[Progress] = []
    policy, attached = quantized(OMEGA, out=out, progress=events.append, **INJECT)
    assert [(e.done, e.total) for e in events] == [(19, 19)]
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(f.name for f in tmp_path.iterdir()) == ["p", "whole"]
    fresh = Stranger()
    attach_pack(fresh, whole)
    assert torch.equal(act(fresh), act(policy))
    assert len(attached.layers) == 19


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": PAPER}, "recipe"),
        ({"seed": 1}, "calibration"),
        ({"inputs": 3}, "calibration"),
        ({"noise": True}, "calibration"),
        ({"weights": 1}, "calibration, checkpoint"),
    ],
)
def test_unfinished_work_of_another_build(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    out = tmp_path / "p"
    with pytest.raises(Killed):
        quantized(OMEGA, out=out, progress=kill_after(4), **INJECT)
    policy = Stranger(change.get("weights", 0))

    def other() -> None:
        for seed in range(change.get("inputs", 4)):
            obs, noise = inputs(seed)
            policy(obs=obs, noise=noise + 1e-6 if "noise" in change else noise)

    options = {**REGEXES, **INJECT, "seed": change.get("seed", 0), "out": out}
    recipe = change.get("recipe", OMEGA)
    with pytest.raises(PackError, match=rf"another build \({named} differ\)"):
        quantize_(policy, recipe, other, **options)
    quantize_(policy, recipe, other, **options, resume=False)
    assert [f.name for f in tmp_path.iterdir()] == ["p"]


def test_little_memory_gives_the_same_layers() -> None:
    one, _ = quantized(PAPER, **INJECT)
    many, _ = quantized(PAPER, **INJECT, memory=1)
    assert torch.equal(act(one), act(many))


def test_bf16_weights() -> None:
    policy = Stranger().to(torch.bfloat16)
    quantize_(policy, PAPER, lambda: calibrate(policy), **REGEXES, **INJECT)
    layer = policy.tower["see"][0].mixer.w_query
    assert layer.weight.dtype == torch.bfloat16 and layer.weight.shape == (32, 32)
    assert layer.weight.isnan().all() and layer.bias.isnan().all()
    assert policy.tower["see"][0].mixer.w_key.bias is None
    assert 0 < drift(policy, Stranger()) < 1.0


def test_under_autocast() -> None:
    """Statistics and integer sums stay exact; the results have autocast's dtype."""
    policy = Stranger()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            calibrate(policy)

    attached = quantize_(policy, OMEGA, run, **REGEXES, **INJECT)
    layer = policy.flow["trunk"][0].ff[0]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = layer(x)
    assert plain.dtype == torch.float32 and cast.dtype == torch.bfloat16
    assert torch.equal(cast, plain.to(torch.bfloat16))
    for name, quant in attached.layers.items():
        assert torch.isfinite(quant.weight_scale).all(), name


def test_another_entry_method() -> None:
    policy = Stranger()

    def run() -> None:
        for seed in range(3):
            policy.act(*inputs(seed))

    quantize_(policy, PAPER, run, **REGEXES, **INJECT, entry="act")
    assert torch.isfinite(act(policy)).all()  # forward calls act


def test_inference_as_a_context() -> None:
    policy, attached = quantized(PAPER, **INJECT)
    expected = act(policy)
    obs, noise = inputs(50)
    with torch.no_grad(), attached.inference():
        assert torch.equal(Stranger.act(policy, obs, noise), expected)
    with pytest.raises(StepError, match="outside an inference"), torch.no_grad():
        Stranger.act(policy, obs, noise)


def test_threads_count_apart() -> None:
    policy, _ = quantized(PAPER, **INJECT)
    expected = [act(policy, seed) for seed in range(4)]
    found: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        for _ in range(5):
            found[seed] = act(policy, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], expected[seed]) for seed in range(4))


@pytest.mark.parametrize("steps", [STEPS - 1, STEPS + 1])
def test_another_number_of_steps_is_refused_at_run_time(steps: int) -> None:
    policy, _ = quantized(PAPER, **INJECT)
    policy.steps = steps
    with pytest.raises(StepError, match=f"calibrated for {STEPS} denoising steps"):
        act(policy)
    policy.steps = STEPS
    assert torch.isfinite(act(policy)).all()  # nothing of the failed one is left behind


def test_dynamic_scales_do_not_mind_the_steps() -> None:
    policy, attached = quantized(OMEGA, **INJECT)
    policy.steps = STEPS + 2
    assert attached.steps is None and torch.isfinite(act(policy)).all()


def refused(
    error: type[Exception], match: str, policy: nn.Module | None = None, **options: Any
) -> None:
    policy = Stranger() if policy is None else policy
    before = {name: type(part) for name, part in policy.named_modules()}
    run = options.pop("run", lambda: calibrate(policy))
    recipe = options.pop("recipe", PAPER)
    with pytest.raises(error, match=match):
        quantize_(policy, recipe, run, **{**REGEXES, **INJECT, **options})
    assert {name: type(part) for name, part in policy.named_modules()} == before
    assert "forward" not in vars(policy)
    assert not any(part._forward_pre_hooks for part in policy.modules() if part is not policy)


def test_nothing_matched() -> None:
    refused(RecipeError, "leave none of the .* linear layers", backbone="nowhere")
    refused(RecipeError, "no layer is named", backbone=None, action_head=None)
    refused(ConfigError, "must match one module, not 0", head="nowhere")
    refused(ConfigError, "must match one module, not", head="trunk")
    refused(ConfigError, "no method 'sample'", entry="sample")


def test_what_may_not_be_replaced() -> None:
    refused(RecipeError, "matches both sides", action_head=BACKBONE)
    kept = SideRecipe(Scheme(weight=WeightScheme(bits=16), balance="output"))
    refused(RecipeError, "`balance` runs one of our", recipe=Recipe("r", kept, kept))
    hooked = Stranger()
    hooked.flow["trunk"][1].ff[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RecipeError, match=r"flow.trunk.1.ff.0 has hooks"):
        quantize_(hooked, PAPER, lambda: calibrate(hooked), **REGEXES, **INJECT)

    class Special(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    special = Stranger()
    special.flow["trunk"][0].ff[0] = Special(32, 64)
    refused(RecipeError, "Special, not a plain", special)


def test_protected_layers() -> None:
    class Named(Stranger):
        def __init__(self) -> None:
            super().__init__()
            self.lm_head = nn.Linear(4, 4)

    refused(RecipeError, "lm_head is a protected layer", Named(), backbone="lm_head")
    allowed = dataclasses.replace(PAPER, allow_protected=True)
    refused(CalibrationError, "lm_head never ran", Named(), backbone="lm_head", recipe=allowed)


def test_calls_that_differ_between_inferences() -> None:
    policy = Stranger()

    def run() -> None:
        for seed, steps in enumerate((3, 3, 4)):
            policy.steps = steps
            obs, noise = inputs(seed)
            policy(obs=obs, noise=noise)

    refused(CalibrationError, "3 times in inference 0 and 4 times in inference 2", policy, run=run)


def test_a_head_that_is_never_called() -> None:
    class Direct(Stranger):
        def act(self, obs: dict[str, Tensor], noise: Tensor) -> Tensor:
            inject, self.flow["inject"] = self.flow["inject"], Bypass(self.flow["inject"])
            try:
                return super().act(obs, noise)
            finally:
                self.flow["inject"] = inject

    refused(CalibrationError, "never called in 4 inference.*module.forward", Direct())


class Bypass(nn.Module):
    """Calls `forward` of what it holds, past its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = [inner]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner[0].forward(x)
        return result


def test_a_step_never_calibrated() -> None:
    class Skipping(Stranger):
        def act(self, obs: dict[str, Tensor], noise: Tensor) -> Tensor:
            x, tokens = noise, obs["tokens"]
            for block in self.tower["see"]:
                tokens = block(tokens=tokens)
            for i in range(self.steps):
                h = self.flow["inject"](x)
                for block in self.flow["trunk"][: 2 if i != 1 else 1]:
                    h = block(tokens=h, memory=tokens)
                x = x + self.flow["emit"](h)
            return x

    refused(CalibrationError, r"flow.trunk.1.* misses denoising step.s. 1 of 3", Skipping())


def test_a_layer_inside_and_outside_the_steps() -> None:
    both = Stranger()
    both.flow["trunk"][0].mixer.mixed = both.tower["see"][0].mixer.mixed
    refused(CalibrationError, "mixed runs both inside and outside", both)


def test_a_calibration_that_runs_nothing_or_does_not_repeat() -> None:
    refused(CalibrationError, "ran no inference", run=lambda: None)
    policy, calls = Stranger(), [3, 2]
    refused(
        CalibrationError,
        "ran 3 inferences first and 2 when called again",
        policy,
        run=lambda: calibrate(policy, calls.pop(0)),
    )


def test_a_compiled_entry_is_refused() -> None:
    policy = Stranger()
    policy.act = torch.compile(policy.act)  # type: ignore[method-assign]
    refused(ConfigError, "'act' is compiled", policy, entry="act")


def test_a_counter_leaves_everything_as_it_found_it() -> None:
    policy = Stranger()
    mine = policy.act
    object.__setattr__(policy, "act", mine)
    counter = StepCounter(policy, "flow.inject", "act")
    counter.install()
    assert vars(policy)["act"] is not mine
    counter.remove()
    assert vars(policy)["act"] is mine
