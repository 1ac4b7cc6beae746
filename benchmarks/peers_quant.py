"""One layer quantized by other libraries and by us: output error on the same tokens.

    python benchmarks/peers_quant.py --checkpoint assets/pi05-metaworld \
        --observations calibration.safetensors held_out.safetensors \
        --json docs/results/peers.json --markdown docs/results/peers.md

Libraries run their own code on the layer's weight and calibration tokens, through the narrowest
entry that takes a single layer; what that entry is says each function's docstring. A library
that is not installed, or fails, is a row with its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from omega_qvla.calibration.collect import collect
from omega_qvla.calibration.samples import read_observations
from omega_qvla.config import PRESETS, Scheme, WeightScheme, preset
from omega_qvla.kernels.reference import linear
from omega_qvla.modules.step_context import Step
from omega_qvla.numerics.metrics import nmse
from omega_qvla.numerics.quantize_layer import quantize_layer
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.policies.registry import load_policy

DEFAULT_LAYERS = {
    "pi05": ("paligemma_with_expert.paligemma.model.language_model.layers.1.mlp.down_proj",),
    "groot_n15": ("action_head.model.transformer_blocks.2.ff.net.2",),
}
GROUP = 128


@dataclasses.dataclass(frozen=True)
class Problem:
    """weight [out, in]; stats of the calibration tokens; held-out tokens [n, in] of one step."""

    weight: Tensor
    stats: LayerStats
    held_out: Tensor
    steps: int | None

    @property
    def tokens(self) -> Tensor:
        """Calibration tokens of all steps [n, in]."""
        return torch.cat(self.stats.tokens)

    def module(self) -> nn.Linear:
        """The layer, without bias."""
        out, width = self.weight.shape
        made = nn.Linear(width, out, bias=False)
        made.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        return made


Run = Callable[[Problem], Tensor]  # the output on the held-out tokens, [n, out]


def torchao_int4(p: Problem) -> Tensor:
    """torchao `quantize_` with IntxWeightOnlyConfig: int4 round to nearest, groups of 128."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = nn.Sequential(p.module())
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP)))
    return model(p.held_out)


def torchao_hqq(p: Problem) -> Tensor:
    """torchao `quantize_`, IntxWeightOnlyConfig with its half-quadratic choice of scales."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_api import IntxChooseQParamsAlgorithm

    model = nn.Sequential(p.module())
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=PerGroup(GROUP),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    quantize_(model, config)
    return model(p.held_out)


def torchao_w4a8(p: Problem) -> Tensor:
    """torchao `quantize_` with Int8DynamicActivationIntxWeightConfig: int4 groups, int8 inputs."""
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    model = nn.Sequential(p.module())
    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(GROUP)
    )
    quantize_(model, config)
    return model(p.held_out)


def torchao_w8a8(p: Problem) -> Tensor:
    """torchao `quantize_` with Int8DynamicActivationInt8WeightConfig."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(p.module())
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model(p.held_out)


def llm_compressor_gptq(p: Problem) -> Tensor:
    """llm-compressor's `quantize_weight` of GPTQModifier, its min-max observer, groups of 128."""
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils import calculate_qparams
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian

    args = QuantizationArgs(num_bits=4, symmetric=True, strategy="group", group_size=GROUP)
    module = p.module()
    hessian, count = make_empty_hessian(module), torch.zeros(())
    hessian, count = accumulate_hessian(p.tokens, module, hessian, count)
    groups = p.weight.unflatten(-1, (-1, GROUP))
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    quantized, *_ = quantize_weight(
        p.weight[None].clone(), (hessian / len(p.tokens))[None], scale[None], zero[None], None, args
    )
    return p.held_out @ quantized[0].float().T


def auto_round(p: Problem) -> Tensor:
    """AutoRound's tunable layer (WrapperLinear) under its SignSGD: 200 steps, groups of 128.

    The library tunes whole transformer blocks of a language model; the loop around its layer is
    ours, with its defaults: batches of 8 sequences' worth of tokens, rate 1/200, falling.
    """
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import WrapperLinear

    module = p.module()
    for name, value in {
        "bits": 4, "group_size": GROUP, "sym": True, "data_type": "int", "act_bits": 16,
        "act_data_type": "int", "act_sym": True, "act_dynamic": True, "act_group_size": -1,
        "scale_dtype": torch.float32, "super_bits": None, "super_group_size": None,
    }.items():  # fmt: skip
        setattr(module, name, value)
    steps = 200
    wrapped = WrapperLinear(module, enable_torch_compile=False, iters=steps)
    optimizer = SignSGD(wrapped.params.values(), lr=1 / steps, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(0)
    best, least = None, float("inf")
    with torch.enable_grad():
        for _ in range(steps):
            rows = torch.randint(len(p.tokens), (1024,), generator=generator)
            x = p.tokens[rows]
            loss = (wrapped(x) - x @ p.weight.T).square().mean()
            if float(loss) < least:
                least = float(loss)
                best = {name: value.detach().clone() for name, value in wrapped.params.items()}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    assert best is not None
    weight, *_ = wrapped._qdq_weight(best["value"], best["min_scale"], best["max_scale"])
    return p.held_out @ weight.detach().float().T


def gptqmodel(p: Problem) -> Tensor:
    """GPTQModel's `GPTQ` task on one linear: add_batch, then quantize; groups of 128."""
    from gptqmodel.looper.named_module import NamedModule
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    named = NamedModule(p.module(), name="layer", full_name="layer", layer_index=0)
    task = GPTQ(named, QuantizeConfig(bits=4, group_size=GROUP, desc_act=False, sym=True))
    task.quantizer.configure(perchannel=True)
    task.add_batch(p.tokens[None], p.tokens[None] @ p.weight.T)
    quantized = task.quantize()[0]
    return p.held_out @ quantized.float().T


PEERS: tuple[tuple[str, str, str, Run], ...] = (
    ("torchao RTN g128", "torchao", "W4A16", torchao_int4),
    ("torchao HQQ g128", "torchao", "W4A16", torchao_hqq),
    ("torchao int4 g128, int8 inputs", "torchao", "W4A8", torchao_w4a8),
    ("torchao int8, int8 inputs", "torchao", "W8A8", torchao_w8a8),
    ("llm-compressor GPTQ g128", "llmcompressor", "W4A16", llm_compressor_gptq),
    ("GPTQModel g128", "gptqmodel", "W4A16", gptqmodel),
    ("AutoRound g128", "auto-round", "W4A16", auto_round),
)


def ours(side: str) -> dict[str, tuple[str, Scheme]]:
    """Name -> (bits, scheme): every preset, and the two that a g128 peer compares with."""
    found: dict[str, tuple[str, Scheme]] = {}
    for group in (GROUP,):
        for method in ("rtn", "gptq"):
            weight = WeightScheme(group=group, method=method, grid="max")
            found[f"{method} g{group} (ours)"] = ("W4A16", Scheme(weight=weight))
    for name in PRESETS:
        part = preset(name).side(side)
        assert part is not None
        activation = part.scheme.activation
        bits = 16 if activation.kind == "none" else activation.bits
        found[name] = (f"W{part.scheme.weight.bits}A{bits}", part.scheme)
    return found


def problem(checkpoint: Path, layer: str, files: list[Path]) -> tuple[Problem, str]:
    """The layer with its calibration and held-out tokens, and its side."""
    policy = load_policy(checkpoint)
    sets = [read_observations(path) for path in files]
    held_set = sets[1].take(range(min(48, len(sets[1]))))
    stats = collect(policy, sets[0], [layer])[layer]
    held = collect(policy, held_set, [layer])[layer]
    module = policy.module.get_submodule(layer)
    assert isinstance(module, nn.Linear)
    steps = len(stats.tokens) if len(stats.tokens) > 1 else None
    made = Problem(module.weight.detach().float(), stats, held.tokens[0].float(), steps)
    return made, policy.side_of(layer)


def rows_of(p: Problem, side: str) -> list[dict[str, Any]]:
    """Every method's output NMSE, or why there is none."""
    exact = p.held_out @ p.weight.T
    rows: list[dict[str, Any]] = []
    for name, package, bits, run in PEERS:
        row: dict[str, Any] = {"method": name, "bits": bits, "version": None}
        try:
            row["version"] = f"{package} {version(package)}"
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                row["nmse"] = nmse(exact, run(p).float())
        except PackageNotFoundError:
            row["failed"] = "not installed"
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        rows.append(row)
    for name, (bits, scheme) in ours(side).items():
        layer = quantize_layer("layer", side, p.weight, None, scheme, p.stats, p.steps)
        step = None if p.steps is None else Step(0, p.steps)
        error = nmse(exact, linear(p.held_out, layer, step))
        rows.append({"method": name, "bits": bits, "version": "omega-qvla", "nmse": error})
    return rows


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown: methods of each width of weights and inputs together, best first."""
    lines = []
    for layer, rows in results.items():
        lines += [f"**{layer}**", "", "| bits | method | from | output NMSE |", "|---|---|---|---|"]
        order = {"W8A8": 0, "W4A16": 1, "W4A8": 2, "W4A4": 3}
        rows = sorted(rows, key=lambda r: (order.get(r["bits"], 9), r.get("nmse", 9.0)))
        for row in rows:
            value = f"{row['nmse']:.5f}" if "nmse" in row else f"could not run: {row['failed']}"
            lines.append(f"| {row['bits']} | {row['method']} | {row['version'] or '-'} | {value} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--checkpoints", type=Path, nargs="+", required=True)
    parser.add_argument("--observations", type=Path, nargs=2, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = {}
    for checkpoint in args.checkpoints:
        for name in DEFAULT_LAYERS[load_policy(checkpoint).family]:
            results[f"{checkpoint.name}: {name}"] = rows_of(
                *problem(checkpoint, name, args.observations)
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    if args.markdown:
        args.markdown.write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
