"""Reading and writing the weights of a checkpoint in the original families' layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from omega_qvla.errors import CheckpointError
from omega_qvla.policies.files import read_json, write_atomically

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Layout:
    """How a family's file differs from the network's state dict.

    family: its name; signature: regexes that must all find a tensor in such a file.
    tied: name in the file -> name in the network, for a matrix stored under either or both.
    stored_tied: whether writing uses the file's name (as `safetensors.save_model` does).
    unused: regex of tensors in the file that inference never reads.
    wide: regex of tensors that stay float32 when a narrower dtype is asked for.
    renamed: (regex, replacement) of names that older files have.
    prefix: what a wrapper's file puts before every name (LeRobot's policies hold the network
        as an attribute); `detect_layout` sets it.
    """

    family: str
    signature: tuple[str, ...]
    tied: Mapping[str, str]
    stored_tied: bool
    unused: str
    wide: str | None = None
    renamed: tuple[tuple[str, str], ...] = ()
    prefix: str = ""

    def network_name(self, stored: str) -> str:
        """The name in the network of a tensor in the file (which may be unknown there)."""
        name = stored.removeprefix(self.prefix)
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return self.tied.get(name, name)

    def is_unused(self, stored: str) -> bool:
        """Whether a tensor of the file belongs to the original but never takes part."""
        return re.search(self.unused, stored.removeprefix(self.prefix)) is not None


_LANGUAGE = "backbone.eagle_model.language_model"

PI05 = Layout(
    family="pi05",
    signature=(
        r"^(action_)?time_mlp_in\.weight$",
        r"^paligemma_with_expert\.gemma_expert\..*\.dense\.weight$",
    ),
    tied={
        "paligemma_with_expert.paligemma.lm_head.weight": (
            "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight"
        )
    },
    stored_tied=True,
    # The expert's head; and what LeRobot's loader drops from files that were made from pi0's.
    unused=(
        r"^paligemma_with_expert\.gemma_expert\.(lm_head"
        r"|model\.(layers\.\d+\.(input|post_attention)_layernorm|norm))\.weight$|^state_proj\."
    ),
    # openpi's run-time mix (gemma_pytorch.py, to_bfloat16_for_selected_params).
    wide=(
        r"^(?!paligemma_with_expert\.)|patch_embedding|position_embedding|input_layernorm"
        r"|post_attention_layernorm|model\.norm"
    ),
    renamed=((r"^action_time_mlp_", "time_mlp_"),),
)
GROOT = Layout(
    family="groot_n15",
    signature=(r"^backbone\.eagle_model\.", r"^action_head\.model\.transformer_blocks\."),
    tied={f"{_LANGUAGE}.lm_head.weight": f"{_LANGUAGE}.model.embed_tokens.weight"},
    stored_tied=False,
    unused=r"^backbone\.eagle_model\.vision_model\.vision_model\.head\.",
)
LAYOUTS = (PI05, GROOT)

#: None (openpi, Isaac-GR00T), LeRobot's pi05, LeRobot's groot.
PREFIXES = ("", "model.", "_groot_model.")

#: Other networks that people may take for these: regex of a tensor -> what it is.
_STRANGERS = (
    (r"action_time_mlp_in", "pi0, whose head is another network than pi0.5's"),
    (
        r"action_head\.model\.transformer_blocks\.|backbone\.(qwen|model\.)|vl_layernorm",
        "a GR00T of another release than N1.5 (N1.6 and N1.7 have another backbone)",
    ),
)

#: Dtypes that weights come in; integers and 8-bit floats are somebody's quantized file.
_DTYPES = ("F64", "F32", "F16", "BF16")


def tensor_files(path: Path) -> dict[str, Path]:
    """Tensor name -> file that holds it. Raises CheckpointError on missing or broken files."""
    index = path / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{index} has no weight_map")
        files = sorted({path / str(name) for name in weight_map.values()})
    else:
        files = [path / WEIGHTS]
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: not a complete checkpoint")
        try:
            with safe_open(file, framework="pt") as handle:
                found |= dict.fromkeys(handle.keys(), file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from error
    return found


def detect_layout(names: Mapping[str, Path], path: Path) -> Layout:
    """The family whose tensors these are. Raises CheckpointError."""
    for prefix in PREFIXES:
        bare = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        for layout in LAYOUTS:
            if all(any(re.search(s, name) for name in bare) for s in layout.signature):
                return replace(layout, prefix=prefix)
    known = (what for pattern, what in _STRANGERS if any(re.search(pattern, n) for n in names))
    hint = next((f". It looks like {what}" for what in known), "")
    raise CheckpointError(
        f"{path} holds neither a pi0.5 (openpi or LeRobot layout) nor a GR00T N1.5 (Isaac-GR00T "
        f"or LeRobot layout) policy; its tensors are called {', '.join(sorted(names)[:3])}, "
        f"...{hint}"
    )


def read_weights(
    files: Mapping[str, Path],
    layout: Layout,
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Load tensors into `model` (which may be on the meta device), strictly.

    Args:
        files: from `tensor_files`.
        model: its state dict names and shapes are what the file must have, no more, no less.
        device, dtype: where and as what; `layout.wide` tensors stay float32 at least.

    Raises:
        CheckpointError: tensors are missing, unknown, of a wrong shape or dtype, or tied and
            unequal.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sources = _resolve_names(files, layout, wanted)
    loaded: dict[str, Tensor] = {}
    for file in sorted(set(files.values())):
        with safe_open(file, framework="pt") as handle:
            for stored, name in sources.items():
                if files[stored] != file:
                    continue
                check_stored(handle, stored, wanted[name])
                tensor = _cast(handle.get_tensor(stored), name, layout, device, dtype)
                if name in loaded and not torch.equal(loaded[name], tensor):
                    raise CheckpointError(f"{stored} and {name} are tied but differ")
                loaded[name] = tensor
    model.load_state_dict(loaded, strict=True, assign=True)


def check_stored(handle: Any, stored: str, shape: tuple[int, ...]) -> None:
    """Raise CheckpointError unless an open file has `stored` in a float dtype and `shape`."""
    view = handle.get_slice(stored)
    if view.get_dtype() not in _DTYPES:
        raise CheckpointError(
            f"{stored} is stored as {view.get_dtype()}: a quantized file? Give the "
            f"original weights ({', '.join(_DTYPES)})"
        )
    found = tuple(view.get_shape())
    if found != shape:
        raise CheckpointError(
            f"{stored} has shape {list(found)}, config.json asks for {list(shape)}"
        )


def _cast(
    tensor: Tensor, name: str, layout: Layout, device: torch.device, dtype: torch.dtype
) -> Tensor:
    # A clone where nothing else copies: otherwise the file stays mapped and open.
    return tensor.to(device, run_dtype(name, layout, dtype), copy=True)


def _resolve_names(
    files: Mapping[str, Path], layout: Layout, wanted: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Stored name -> name in the network."""
    sources, unknown = {}, []
    for stored in files:
        name = layout.network_name(stored)
        if name in wanted:
            sources[stored] = name
        elif not layout.is_unused(stored):
            unknown.append(stored)
    missing = sorted(set(wanted) - set(sources.values()))
    faults = [f"missing {_some(missing)}"] if missing else []
    faults += [f"unknown {_some(sorted(unknown))}"] if unknown else []
    if faults:
        raise CheckpointError(
            f"the tensors do not fit the {layout.family} network of config.json: "
            + "; ".join(faults)
        )
    return sources


def network_names(files: Mapping[str, Path], layout: Layout, model: nn.Module) -> dict[str, str]:
    """Name in the file -> name in the network, strictly (a tie may be stored under both).

    Raises:
        CheckpointError: tensors are missing, unknown, of a wrong shape or dtype.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = _resolve_names(files, layout, wanted)
    for file in sorted({files[stored] for stored in names}):
        with safe_open(file, framework="pt") as handle:
            for stored, name in names.items():
                if files[stored] == file:
                    check_stored(handle, stored, wanted[name])
    return names


def stored_names(files: Mapping[str, Path], layout: Layout, model: nn.Module) -> dict[str, str]:
    """Name in the network -> name in the file, strictly. Raises CheckpointError."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {name: stored for stored, name in _resolve_names(files, layout, wanted).items()}


def run_dtype(name: str, layout: Layout, dtype: torch.dtype) -> torch.dtype:
    """What the tensor `name` runs as when a network is loaded as `dtype`."""
    wide = layout.wide is not None and dtype.itemsize < 4 and re.search(layout.wide, name)
    return torch.float32 if wide else dtype


def write_weights(path: Path, layout: Layout, model: nn.Module, dtype: torch.dtype) -> None:
    """Write `model.safetensors` with every tensor as `dtype`, atomically.

    The tie is recorded in the metadata as `safetensors.save_model` does it.

    Raises:
        CheckpointError: `dtype` cannot hold a value.
    """
    names = {name: stored for stored, name in layout.tied.items()} if layout.stored_tied else {}
    state = {
        names.get(name, name): narrowed(name, tensor.detach(), dtype).cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    metadata = {"format": "pt", **names}
    write_atomically(path / WEIGHTS, lambda file: save_file(state, file, metadata))


def narrowed(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in another dtype. Raises CheckpointError where a finite value becomes infinite."""
    narrow = tensor.to(dtype)
    if not torch.equal(torch.isfinite(narrow), torch.isfinite(tensor)):
        largest = float(tensor[torch.isfinite(tensor)].abs().max())
        raise CheckpointError(
            f"{name} holds a value of {largest:.6g} and {dtype} ends at "
            f"{torch.finfo(dtype).max:.6g}; narrow to bfloat16, or keep the checkpoint's dtype"
        )
    return narrow


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
