"""The pack: the quantized layers of one checkpoint in one checked file."""

from omega_qvla.pack.apply import ApplyReport, apply_pack
from omega_qvla.pack.manifest import LayerEntry, Manifest
from omega_qvla.pack.merge import merge_packs
from omega_qvla.pack.reader import Pack, Sizes, read_manifest, read_pack
from omega_qvla.pack.verify import Check, verify_pack
from omega_qvla.pack.writer import write_pack

__all__ = [
    "ApplyReport",
    "Check",
    "LayerEntry",
    "Manifest",
    "Pack",
    "Sizes",
    "apply_pack",
    "merge_packs",
    "read_manifest",
    "read_pack",
    "verify_pack",
    "write_pack",
]
