"""Build a 4-bit pack of a checkpoint from recorded observations, prove it, and bundle both.

    python examples/build_pack.py CHECKPOINT RECORDINGS OUT

CHECKPOINT has any layout of docs/checkpoints.md, RECORDINGS is a folder as docs/observations.md
describes it. Run it again after an interruption: it goes on where it stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

from omega_qvla import load_policy, preset, quantize_policy, verify_pack, write_bundle
from omega_qvla.calibration.sources import ObservationMap, RecordedFolder, draw


def main(checkpoint: str, recordings: str, out: str) -> None:
    """Write OUT/omega.safetensors and OUT/bundle."""
    policy = load_policy(checkpoint)
    source = RecordedFolder.open(recordings, policy.cameras, ObservationMap({}))
    samples = draw(source, 10, which="calibration")  # balanced; a fifth of the episodes is left out
    pack = quantize_policy(policy, preset("omega"), samples, out=Path(out) / "omega.safetensors")
    checks = verify_pack(pack, policy)
    print(f"{pack}: {len(checks)} checks hold")
    manifest = write_bundle(checkpoint, pack, Path(out) / "bundle")
    print(f"bundle: {manifest.total_bytes} bytes, {manifest.num_steps} denoising steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
