"""One product of llama.cpp's tensor library, by ctypes: what its Python package (llama-cpp-python)
ships as `llama_cpp/lib/libggml*.so` but does not expose.

Weights are quantized to Q4_0 by the library and put into the buffer in which it repacks them for
this CPU, as it does when a model is loaded.
"""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from collections.abc import Callable
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_F32, _Q4_0 = 0, 2  # enum ggml_type
_META = 1 << 20  # bytes for descriptions of tensors
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph": (c_void_p, [c_void_p]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_nbytes": (c_size_t, [c_void_p]),
    "ggml_quantize_chunk": (
        c_size_t,
        [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p],
    ),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_cpu_buffer_type": (c_void_p, []),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
}


class _Params(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


class _Library:
    """Every function of the three shared objects by name."""

    def __init__(self, folder: Path) -> None:
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        self._parts = [
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
            for name in names
            if (folder / name).exists()
        ]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        for part in self._parts:
            if hasattr(part, name):
                function = getattr(part, name)
                if name in _SIGNATURES:
                    function.restype, function.argtypes = _SIGNATURES[name]
                return function  # type: ignore[no-any-return]
        raise AttributeError(f"this ggml has no {name}")


@cache
def _library() -> _Library:
    found = importlib.util.find_spec("llama_cpp")
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'llama_cpp'")
    library = _Library(Path(found.submodule_search_locations[0]) / "lib")
    library.ggml_init.restype, library.ggml_init.argtypes = c_void_p, [_Params]
    return library


def _repacking_buffer(library: _Library) -> int:
    """The buffer type in which weights are laid out for this CPU, or the plain one."""
    registry = library.ggml_backend_cpu_reg()
    device = library.ggml_backend_reg_dev_get(registry, 0)
    address = library.ggml_backend_reg_get_proc_address(
        registry, b"ggml_backend_dev_get_extra_bufts"
    )
    listed = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
    for kind in itertools.takewhile(bool, listed):
        if library.ggml_backend_buft_name(kind) in (b"AMX", b"CPU_REPACK"):  # the faster first
            return int(kind)
    return int(library.ggml_backend_cpu_buffer_type())


def product(weight: Tensor, x: Tensor, threads: int) -> Callable[[], Any]:
    """weight [N, K], x [M, K], float32 -> a call that makes y [M, N]; `call.result()` copies it.

    Raises ImportError where llama-cpp-python is not installed.
    """
    lib = _library()
    (n, k), m = weight.shape, x.shape[0]
    weights, rest = (lib.ggml_init(_Params(_META, None, True)) for _ in range(2))
    w = lib.ggml_new_tensor_2d(weights, _Q4_0, k, n)
    lib.ggml_backend_alloc_ctx_tensors_from_buft(weights, _repacking_buffer(lib))
    packed = ctypes.create_string_buffer(lib.ggml_nbytes(w))
    lib.ggml_quantize_chunk(_Q4_0, weight.contiguous().data_ptr(), packed, 0, n, k, None)
    lib.ggml_backend_tensor_set(w, packed, 0, len(packed))
    given = lib.ggml_new_tensor_2d(rest, _F32, k, m)
    y = lib.ggml_mul_mat(rest, w, given)
    graph = lib.ggml_new_graph(rest)
    lib.ggml_build_forward_expand(graph, y)
    lib.ggml_backend_alloc_ctx_tensors_from_buft(rest, lib.ggml_backend_cpu_buffer_type())
    lib.ggml_backend_tensor_set(given, x.contiguous().data_ptr(), 0, x.numel() * 4)
    backend = lib.ggml_backend_cpu_init()
    lib.ggml_backend_cpu_set_n_threads(backend, threads)

    def call() -> None:
        if lib.ggml_backend_graph_compute(backend, graph):
            raise RuntimeError("ggml did not compute the product")

    def result() -> Tensor:
        out = x.new_empty(m, n)
        lib.ggml_backend_tensor_get(y, out.data_ptr(), 0, out.numel() * 4)
        return out

    call.result = result  # type: ignore[attr-defined]
    return call
