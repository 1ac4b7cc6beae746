"""The kernels built in other ways: sanitizers, another CPU, no compiler. Most are slow."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from omega_qvla.kernels.cpu import isa_names

ROOT = Path(__file__).resolve().parents[2]
# Of the bits of every result of 40 cases: on x86-64 and on AArch64, with libstdc++'s drawings.
DIGEST = "digest 76294f4b2a69a6df"


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def build_check(folder: Path, flags: str, *options: str) -> Path:
    """csrc/check.cpp built with these compiler flags, `check_rows` (its neighbour) too."""
    need("cmake")
    configure = ["cmake", "-S", str(ROOT / "cmake" / "check"), "-B", str(folder)]
    configure += [f"-DCMAKE_CXX_FLAGS={flags}", "-DCMAKE_BUILD_TYPE=Release", *options]
    for command in (configure, ["cmake", "--build", str(folder), "-j", "2"]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder / "check"


def run_check(command: list[str], *names: str, **environment: str) -> None:
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    for name in names:
        assert name in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    need("g++")
    flags = f"-g -fsanitize={sanitizer} -fno-sanitize-recover=all"
    program = build_check(tmp_path, flags, "-DCMAKE_CXX_COMPILER=g++")
    run_check([str(program), "40"], "portable", DIGEST, "0 failures")
    run_check([str(program.with_name("check_rows")), "60"], "portable", "60 cases, 0 failures")


def test_aarch64_under_emulation(tmp_path: Path) -> None:
    """The bits of x86-64, on NEON and on plain vectors. Not slow: no other test reaches NEON."""
    need("aarch64-linux-gnu-g++", "qemu-aarch64")
    program = build_check(
        tmp_path,
        "-static",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
    )
    neon = ["qemu-aarch64", "-cpu", "max", str(program), "40"]
    run_check(neon, "neon-dotprod", DIGEST, "0 failures")
    plain = ["qemu-aarch64", "-cpu", "cortex-a53", str(program), "40"]
    run_check(plain, "portable", DIGEST, "0 failures")
    rows = str(program.with_name("check_rows"))
    run_check(["qemu-aarch64", "-cpu", "max", rows, "40"], "neon-dotprod", "40 cases, 0 failures")
    run_check(["qemu-aarch64", "-cpu", "cortex-a53", rows, "10"], "portable", "0 failures")


def test_matrix_unit_under_emulation(tmp_path: Path) -> None:
    """Plain loops in place of its instructions. Not slow: elsewhere no other test reaches it."""
    names = isa_names()
    if "amx-int8" in names or "avx512-vnni" not in names:
        pytest.skip("this CPU has a matrix unit, or not the vectors that go with one")
    program = build_check(tmp_path, "", "-DOMEGA_EMULATE_TILES=ON")
    run_check([str(program), "40"], "amx-int8", DIGEST, "0 failures")


@pytest.mark.slow
def test_the_package_installs_without_a_compiler(tmp_path: Path) -> None:
    """A wheel comes out, without the module, and the build says why."""
    pytest.importorskip("scikit_build_core")
    need("cmake", "ninja")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cmake", "ninja", "uname", "env"):
        if found := shutil.which(tool):
            (tools / tool).symlink_to(found)
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    run = subprocess.run(
        [*command, "--wheel-dir", str(tmp_path / "out"), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        env={
            **{k: v for k, v in os.environ.items() if k not in ("CXX", "CC")},
            "PATH": str(tools),
            "SKBUILD_BUILD_DIR": str(tmp_path / "build"),
        },
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0, said[-3000:]
    assert "native CPU kernels are not built" in said and "no working C++ compiler" in said
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "omega_qvla/kernels/cpu.py" in names and "omega_qvla/py.typed" in names
    assert not [name for name in names if name.endswith((".so", ".a"))]
