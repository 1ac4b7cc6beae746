"""Checkpoints of the published size with random weights, and observations for them.

    python benchmarks/true_size.py checkpoint pi05 DIR        # openpi's layout, 7.2 GB
    python benchmarks/true_size.py checkpoint groot_n15 DIR   # Isaac-GR00T's, two shards, 4.9 GB
    python benchmarks/true_size.py observations FILE [--count 10] [--seed 0]
    python benchmarks/true_size.py chunk BUNDLE OBSERVATIONS [--backend native]

What a build costs (time, memory, bytes) depends on sizes, not on what the weights have
learned, so this stands in for checkpoints that are not free to pass on. Weights are normal
with variance 1 / fan-in (residual outputs less), written one tensor at a time in bfloat16.
Outlier channels as real checkpoints have them are put in by scaling channels up where they
are produced and down where they are read: some channels of attention and MLP inputs by 6 to 12,
of the inputs of down projections by 24 to 200, in a few layers two channels by thousands.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import re
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.calibration.samples import SampleMeta, read_observations, write_observations
from omega_qvla.files import atomic_file
from omega_qvla.policies.base import Site
from omega_qvla.policies.checkpoint import GROOT, PI05, WEIGHTS
from omega_qvla.policies.files import write_json
from omega_qvla.policies.groot_n15.config import GrootConfig
from omega_qvla.policies.groot_n15.model import GrootModel
from omega_qvla.policies.groot_n15.policy import GrootPolicy
from omega_qvla.policies.groot_n15.processor import GrootProcessor
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.pi05.config import Pi05Config
from omega_qvla.policies.pi05.model import Pi05Model
from omega_qvla.policies.pi05.policy import Pi05Policy
from omega_qvla.policies.pi05.processor import Pi05Processor
from omega_qvla.policies.statistics import compute_statistics
from omega_qvla.policies.tokenizer import GROOT_IMAGE, build_groot_tokenizer, build_pi05_tokenizer
from omega_qvla.runtime.engine import Engine

#: As in LIBERO: two cameras of 256 pixels, 8 state channels, 7 action channels.
CAMERAS, SIDE, STATE_DIM, ACTION_DIM = ("base", "wrist"), 256, 8, 7
PROMPTS = (
    "pick up the black bowl between the plate and the ramekin and place it on the plate",
    "put both the alphabet soup and the tomato sauce in the basket",
    "open the middle drawer of the cabinet and put the wine bottle on top of the cabinet",
)
SHARD = 4_900_000_000  # bytes, as Hugging Face splits
_RESIDUAL = re.compile(r"\.(o_proj|out_proj|down_proj|fc2|to_out\.0|net\.2)\.weight$")
_SMALL = re.compile(r"(norm1\.linear|proj_out_1|action_decoder\.layer2)\.(weight|W)$")
#: Language layers with two channels of thousands, as L2, L5 and L9 of the real ones have.
_MASSIVE = re.compile(r"language_model\S*\.layers\.(2|5|9)\.mlp\.up_proj$")

Change = Callable[[Tensor], Tensor]


def groot_config(tokenizer_image: int) -> GrootConfig:
    """The published N1.5, its image placeholder being the small tokenizer's."""
    config = GrootConfig()
    eagle = dataclasses.replace(config.eagle, image_token_index=tokenizer_image)
    return dataclasses.replace(config, eagle=eagle, extra={"torch_dtype": "bfloat16"})


def blank(family: str) -> Pi05Policy | GrootPolicy:
    """The policy on the meta device, with a processor of its own."""
    rng = np.random.default_rng(0)
    state = compute_statistics(rng.normal(size=(256, STATE_DIM)))
    actions = compute_statistics(rng.uniform(-1, 1, (256, ACTION_DIM)))
    if family == "pi05":
        tokenizer = build_pi05_tokenizer(PROMPTS)
        config = Pi05Config.from_dict(
            {
                "action_dim": 32,
                "action_horizon": 10,
                "paligemma_variant": "gemma_2b",
                "action_expert_variant": "gemma_300m",
                "precision": "bfloat16",
            }
        )
        with torch.device("meta"):
            model = Pi05Model(config)
        processor = Pi05Processor.create(
            config, tokenizer, state, actions, CAMERAS, resize=True, asset_id="true-size"
        )
        return Pi05Policy(model, processor)
    groot_tokenizer = build_groot_tokenizer(PROMPTS)
    groot = groot_config(groot_tokenizer.token_to_id(GROOT_IMAGE))
    with torch.device("meta"):
        groot_model = GrootModel(groot)
    groot_processor = GrootProcessor.create(
        groot, groot_tokenizer, state, actions, CAMERAS, embodiment_id=31, resize=True, crop=0.95
    )
    return GrootPolicy(groot_model, groot_processor)


def _seeded(name: str) -> torch.Generator:
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def plain_tensor(name: str, shape: tuple[int, ...], depth: int) -> Tensor:
    """Float32 [shape]: the network's tensor `name` before outliers, from its name alone."""
    generator = _seeded(name)
    if len(shape) == 1 or name.endswith(".b"):
        offset = 0.0
        if name.endswith("norm.weight") or re.search(r"norm\d?\.weight$|vlln\.weight$", name):
            offset = 0.0 if "paligemma" in name and "vision" not in name else 1.0
        tensor = torch.randn(shape, generator=generator).mul_(0.02).add_(offset)
        if name.endswith("norm.dense.bias"):  # adaRMS: gates open
            tensor[2 * (shape[0] // 3) :] += 1.0
        return tensor
    fan_in = shape[1] if name.endswith((".W",)) and len(shape) == 3 else math.prod(shape[1:])
    std = fan_in**-0.5
    if name.endswith((".dense.weight", "position_embedding.weight")):
        std = 0.02
    elif name.endswith("future_tokens.weight"):
        std = 0.3
    elif _RESIDUAL.search(name):
        std /= math.sqrt(2 * depth)
    elif _SMALL.search(name):
        std *= 0.1
    elif "backbone" in name and name.endswith("embed_tokens.weight"):
        std = 1.0
    return torch.empty(shape).normal_(generator=generator).mul_(std)


def outliers(policy: Pi05Policy | GrootPolicy) -> dict[str, list[Change]]:
    """Tensor name -> what to do to it so that sites get outlier channels."""
    changes: dict[str, list[Change]] = {}
    for site in policy.sites():
        producer = site.producer
        if producer is None or producer.heads is not None:
            continue
        channels, factors = _draw(policy.module, site)

        def columns(w: Tensor, c: Tensor = channels, f: Tensor = factors) -> Tensor:
            w[:, c] /= f
            return w

        for name in (*site.consumers, *site.coupled):
            changes.setdefault(f"{name}.weight", []).append(columns)
        for field, change in _producing(producer.kind, channels, factors).items():
            changes.setdefault(f"{producer.name}.{field}", []).append(change)
    return changes


def _draw(module: nn.Module, site: Site) -> tuple[Tensor, Tensor]:
    """(channels, factors) of a site: several ordinary outliers, here and there massive ones."""
    name = site.consumers[0]
    width = module.get_submodule(name).in_features
    generator = _seeded(f"outliers {name}")
    down = site.producer is not None and site.producer.kind == "rows"
    count, low, high = (8, 24.0, 200.0) if down else (6, 6.0, 12.0)
    channels = torch.randperm(width, generator=generator)[:count]
    spread = torch.rand(count, generator=generator)
    factors = 2.0 ** (math.log2(low) + spread * math.log2(high / low))
    if site.producer is not None and _MASSIVE.search(site.producer.name):
        factors[:2] = 4096.0
    return channels, factors


def _producing(kind: str, channels: Tensor, factors: Tensor) -> dict[str, Change]:
    """Field of the producing layer -> how it scales its channels up."""

    def rows(w: Tensor) -> Tensor:
        w[channels] *= factors if w.ndim == 1 else factors[:, None]
        return w

    def one_plus(w: Tensor) -> Tensor:
        w[channels] = (1 + w[channels]) * factors - 1
        return w

    def modulation(w: Tensor) -> Tensor:
        """(scale, shift, ...) of x * (1 + scale) + shift, in chunks of the consumers' width."""
        width = w.shape[0] // (3 if w.shape[0] % 3 == 0 and w.shape[0] == 3072 else 2)
        gain = factors if w.ndim == 1 else factors[:, None]
        for start in (0, width):
            w[start + channels] *= gain
        if w.ndim == 1:
            w[channels] += factors - 1
        return w

    if kind == "norm1":
        return {"weight": one_plus}
    if kind == "adaptive":
        return {"weight": modulation, "bias": modulation}
    return {"weight": rows}


def extras(family: str) -> dict[str, tuple[int, ...]]:
    """Tensors that the published files have and inference never reads."""
    if family == "pi05":
        return {"paligemma_with_expert.gemma_expert.lm_head.weight": (257152, 1024)}
    head = "backbone.eagle_model.vision_model.vision_model.head"
    return {
        f"{head}.probe": (1, 1, 1152),
        f"{head}.attention.in_proj_weight": (3456, 1152),
        f"{head}.attention.in_proj_bias": (3456,),
        f"{head}.attention.out_proj.weight": (1152, 1152),
        f"{head}.attention.out_proj.bias": (1152,),
        f"{head}.layernorm.weight": (1152,),
        f"{head}.layernorm.bias": (1152,),
        f"{head}.mlp.fc1.weight": (4304, 1152),
        f"{head}.mlp.fc1.bias": (4304,),
        f"{head}.mlp.fc2.weight": (1152, 4304),
        f"{head}.mlp.fc2.bias": (1152,),
    }


def write_checkpoint(family: str, folder: Path) -> None:
    """Write a whole checkpoint; the same bytes every time."""
    policy = blank(family)
    folder.mkdir(parents=True, exist_ok=True)
    policy.processor.save(folder)
    write_json(folder / "config.json", policy.model.config.to_dict())
    shapes = {name: tuple(t.shape) for name, t in policy.module.state_dict().items()}
    shapes |= extras(family)
    changes = outliers(policy)
    layout = PI05 if family == "pi05" else GROOT
    tied = {name: stored for stored, name in layout.tied.items()} if layout.stored_tied else {}

    def tensors(names: list[str]) -> Iterator[Tensor]:
        for name in names:
            tensor = plain_tensor(name, shapes[name], 18 if family == "pi05" else 14)
            for change in changes.get(name, ()):
                tensor = change(tensor)
            yield tensor.to(torch.bfloat16)

    shards = _shards(shapes) if family == "groot_n15" else [list(shapes)]
    weight_map = {}
    for i, names in enumerate(shards):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        stored = {tied.get(name, name): shapes[name] for name in names}
        weight_map |= dict.fromkeys(stored, file)
        stream_tensors(folder / file, stored, tensors(names), tied)
        print(f"{folder / file}: {(folder / file).stat().st_size / 1e9:.2f} GB", flush=True)
    if len(shards) > 1:
        total = sum(2 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if used + size > SHARD / 2:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def stream_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Iterator[Tensor],
    metadata: Mapping[str, str],
) -> None:
    """A safetensors file of bfloat16 tensors that are made while it is written."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with atomic_file(path) as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            file.write(tensor.contiguous().view(torch.uint8).numpy().data)


def make_observations(path: Path, count: int, seed: int) -> None:
    """Smooth random pictures with a few hard edges, each of its own episode."""
    rng = np.random.default_rng(seed)
    observations = []
    for i in range(count):
        images = {}
        for camera in CAMERAS:
            coarse = torch.from_numpy(rng.uniform(0, 255, (1, 3, 8, 8)))
            smooth = nn.functional.interpolate(coarse, (SIDE, SIDE), mode="bicubic")[0]
            picture = smooth.clamp(0, 255).numpy().transpose(1, 2, 0)
            for _ in range(6):
                y, x = rng.integers(0, SIDE - 40, 2)
                picture[y : y + 40, x : x + 40] = rng.uniform(0, 255, 3)
            picture += rng.normal(0, 4, picture.shape)
            images[camera] = picture.clip(0, 255).astype(np.uint8)
        state = rng.normal(size=STATE_DIM).astype(np.float32)
        observations.append(Observation(images, state, PROMPTS[i % len(PROMPTS)]))
    meta = [SampleMeta(i, 0, PROMPTS[i % len(PROMPTS)]) for i in range(count)]
    write_observations(path, observations, meta, f"random pictures, seed {seed}")


def run_chunk(args: argparse.Namespace) -> None:
    """One action chunk, its time and the peak memory of this process, as JSON."""
    observation = read_observations(args.observations).observations[args.index]
    begun = time.perf_counter()
    dtype = getattr(torch, args.dtype)
    engine = Engine.load(args.bundle, args.pack, backend=args.backend, dtype=dtype)
    loaded = time.perf_counter()
    peak_loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    actions = engine.infer(observation, seed=0)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        json.dumps(
            {
                "bundle": str(args.bundle),
                "backend": engine.backend,
                "load_s": loaded - begun,
                "chunk_s": done - loaded,
                "peak_loading_mib": peak_loaded / 1024,
                "peak_mib": peak / 1024,
                "actions": actions.tolist(),
            }
        )
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("checkpoint")
    verb.add_argument("family", choices=["pi05", "groot_n15"])
    verb.add_argument("out", type=Path)
    verb = verbs.add_parser("observations")
    verb.add_argument("out", type=Path)
    verb.add_argument("--count", type=int, default=10)
    verb.add_argument("--seed", type=int, default=0)
    verb = verbs.add_parser("chunk")
    verb.add_argument("bundle", type=Path, help="or a checkpoint")
    verb.add_argument("observations", type=Path)
    verb.add_argument("--pack", type=Path)
    verb.add_argument("--index", type=int, default=0)
    verb.add_argument("--backend", default="native")
    verb.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def main() -> None:
    """Do what the command line says."""
    args = parse()
    if args.verb == "checkpoint":
        write_checkpoint(args.family, args.out)
    elif args.verb == "observations":
        make_observations(args.out, args.count, args.seed)
    else:
        run_chunk(args)


if __name__ == "__main__":
    main()
