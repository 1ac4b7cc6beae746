"""Running a policy over calibration observations, exactly as inference runs it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from omega_qvla.calibration.observers import InputObserver
from omega_qvla.calibration.samples import ObservationSet
from omega_qvla.errors import CalibrationError
from omega_qvla.numerics.stats import LayerStats
from omega_qvla.pack.files import (
    Header,
    check_replaceable,
    hash_entries,
    read_header,
    tensor_sha256,
    why_not_written,
    write_tensors,
)
from omega_qvla.pack.manifest import sha256_text, source_digest
from omega_qvla.pack.reader import load_tensors
from omega_qvla.policies.base import Policy
from omega_qvla.policies.observation import Observation
from omega_qvla.policies.registry import source_hashes
from omega_qvla.policies.weights import main_dtype

FORMAT_NAME = "omega-qvla calibration"
DEFAULT_TOKEN_CAP = 1024
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Calibration:
    """Statistics of a policy's layers and where they come from.

    stats: layer name -> statistics; layers that share an input share one object.
    provenance: source, count, seed, token cap, steps, samples, and the hashes of the
        observations and of the checkpoint; plain JSON values.
    """

    stats: Mapping[str, LayerStats]
    provenance: Mapping[str, Any]

    def digest(self) -> str:
        """sha256 over provenance and every statistic."""
        return sha256_text(_index(self)[0])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, atomically.

        Raises:
            CalibrationError: it cannot be written, or something else than a calibration is there.
        """
        check_replaceable(Path(path), FORMAT_NAME, CalibrationError)
        text, tensors = _index(self)
        metadata = {"format": FORMAT_NAME, "index": text, "index_sha256": sha256_text(text)}
        try:
            write_tensors(Path(path), tensors, metadata)
        except OSError as error:
            raise CalibrationError(
                f"{os.fspath(path)}: cannot be written: {why_not_written(error)}"
            ) from error
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read what `save` wrote.

        Raises:
            CalibrationError: no such file, truncated, altered, or not a calibration.
        """
        path = Path(path)
        header = read_header(path, CalibrationError)
        metadata = header.metadata
        if metadata.get("format") != FORMAT_NAME:
            raise CalibrationError(f"{path}: not a calibration")
        text = metadata.get("index", "")
        if sha256_text(text) != metadata.get("index_sha256"):
            raise CalibrationError(f"{path}: the header is altered (sha256 differs)")
        try:
            return cls._from_index(path, header, json.loads(text))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise CalibrationError(f"{path}: a damaged index: {error!r}") from error

    @classmethod
    def _from_index(cls, path: Path, header: Header, index: Mapping[str, Any]) -> Calibration:
        altered = [
            name
            for name, digest in hash_entries(path, header).items()
            if index["tensors"].get(name) != digest
        ]
        if altered or set(index["tensors"]) != set(header.entries):
            raise CalibrationError(f"{path}: altered tensors: {', '.join(altered[:5])}")
        tensors = load_tensors(path, header.entries, CalibrationError)
        groups = {
            leader: LayerStats(
                hessian=tensors[f"{leader}.hessian"],
                profile=tensors[f"{leader}.profile"],
                tokens=tuple(tensors[f"{leader}.tokens.{i}"] for i in range(group["steps"])),
                count=group["count"],
            )
            for leader, group in index["groups"].items()
        }
        stats = {name: groups[leader] for name, leader in index["members"].items()}
        return cls(stats, index["provenance"])


def _index(calibration: Calibration) -> tuple[str, dict[str, Tensor]]:
    """Canonical JSON of everything, tensors by hash, and the tensors, each group's once."""
    leaders: dict[int, str] = {}
    members: dict[str, str] = {}
    groups: dict[str, dict[str, int]] = {}
    tensors: dict[str, Tensor] = {}
    for name in sorted(calibration.stats):
        stats = calibration.stats[name]
        leader = members[name] = leaders.setdefault(id(stats), name)
        if leader != name:
            continue
        groups[name] = {"count": stats.count, "steps": len(stats.tokens)}
        tensors[f"{name}.hessian"] = stats.hessian
        tensors[f"{name}.profile"] = stats.profile
        for i, tokens in enumerate(stats.tokens):
            tensors[f"{name}.tokens.{i}"] = tokens
    index = {
        "groups": groups,
        "members": members,
        "provenance": dict(calibration.provenance),
        "tensors": {name: tensor_sha256(tensor) for name, tensor in tensors.items()},
    }
    return json.dumps(index, sort_keys=True, separators=(",", ":")), tensors


def collect(
    policy: Policy,
    observations: Iterable[Observation],
    layer_names: Sequence[str],
    *,
    num_steps: int | None = None,
    token_cap: int = DEFAULT_TOKEN_CAP,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, LayerStats]:
    """Run `policy` on each observation once and summarise the inputs of the named linears.

    Every token enters the Hessian and the robust profile; at most `token_cap` tokens per layer
    and step are kept, an equal share of each observation's. `progress(done, total)` is called
    after each observation.

    Raises:
        CalibrationError: no observations, an unknown layer, one that never runs or misses a
            step, or a non-finite input (layer and step named).
        ObservationError: an observation that the policy refuses.
    """
    chosen = list(observations)
    if not chosen or token_cap < 1:
        raise CalibrationError(
            f"calibration takes observations and a token cap of at least 1; got {len(chosen)} "
            f"and {token_cap}"
        )
    steps = policy.num_steps if num_steps is None else num_steps
    observer = InputObserver(
        linears(policy.module, layer_names),
        num_steps=steps,
        token_cap=token_cap,
        observations=len(chosen),
        seed=seed,
    )
    with torch.no_grad():
        for index, observation in enumerate(chosen):
            with observer.watching(index):
                prefix = policy.encode(policy.prepare([observation]))
                policy.sample(prefix, policy.draw_noise(1, noise_seed(seed, index)), steps)
            if progress is not None:
                progress(index + 1, len(chosen))
    return observer.finish()


def noise_seed(seed: int, index: int) -> int:
    """Seed of the noise that calibration observation number `index` is run with."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])


def linears(module: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    found = dict(module.named_modules())
    for name in names:
        if name not in found:
            raise CalibrationError(f"the policy has no layer {name}")
        if not hasattr(found[name], "in_features"):
            raise CalibrationError(f"{name} is a {type(found[name]).__name__}, not a linear layer")
    return {name: found[name] for name in names}


def provenance(
    policy: Policy,
    samples: ObservationSet,
    *,
    num_steps: int | None = None,
    token_cap: int = DEFAULT_TOKEN_CAP,
    seed: int = 0,
    source: Mapping[str, str] | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """What a calibration with these arguments is made from; it determines its statistics.

    source: `source_hashes(policy)`, where the caller already has them. dtype: what the network
    runs in, where its weights are not there to tell.
    """
    source = source_hashes(policy) if source is None else source
    return {
        "source": samples.source,
        "count": len(samples),
        "seed": seed,
        "token_cap": token_cap,
        "num_steps": policy.num_steps if num_steps is None else num_steps,
        "dtype": main_dtype(policy.module) if dtype is None else dtype,
        "samples": [[meta.task, meta.episode, meta.step] for meta in samples.meta],
        "observations_sha256": samples.digest(),
        "checkpoint_sha256": source_digest(source),
    }


def calibrate(
    policy: Policy,
    samples: ObservationSet,
    layer_names: Sequence[str],
    *,
    num_steps: int | None = None,
    token_cap: int = DEFAULT_TOKEN_CAP,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """`collect` with its provenance. Raises as `collect`."""
    origin = provenance(policy, samples, num_steps=num_steps, token_cap=token_cap, seed=seed)
    stats = collect(
        policy,
        samples,
        layer_names,
        num_steps=num_steps,
        token_cap=token_cap,
        seed=seed,
        progress=progress,
    )
    return Calibration(stats, origin)
