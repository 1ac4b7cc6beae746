"""The bundle: a pack and all else that its policy needs, in one folder that stands alone."""

from omega_qvla.bundle.manifest import BundleManifest, is_bundle, read_bundle
from omega_qvla.bundle.options import BundleOptions
from omega_qvla.bundle.reader import load_bundle
from omega_qvla.bundle.sizes import predict_sizes
from omega_qvla.bundle.writer import write_bundle

__all__ = [
    "BundleManifest",
    "BundleOptions",
    "is_bundle",
    "load_bundle",
    "predict_sizes",
    "read_bundle",
    "write_bundle",
]
