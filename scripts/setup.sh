#!/usr/bin/env bash
# Brings a fresh Debian/Ubuntu machine to where the Makefile can run something.
#
#   scripts/setup.sh venv   .venv with the package (editable) and all extras; instant if current
#   scripts/setup.sh gl     a library for headless rendering; nothing to do if there is one
#
# Missing system packages are installed with apt where that is allowed (root, or sudo without
# a password); otherwise the package is named and the script stops.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly VENV=.venv
readonly STAMP=$VENV/.installed
readonly EXTRAS=checkpoints,lerobot,metaworld,report,serve,video,dev

say() { printf '%s\n' "setup: $*" >&2; }
die() { say "$@"; exit 1; }

# apt_install PACKAGE...: succeeds only if the packages are there afterwards.
apt_install() {
    local -a as_root=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as_root=(sudo -n)
    fi
    say "installing $* with apt"
    "${as_root[@]}" apt-get -qq update >&2 || true  # a stale list may still do
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >&2
}

# The Python that makes the environment: 3.11, which the pins are for, before newer ones.
# A name on PATH may be a shim without an interpreter behind it, so each one is run.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python version
    if ! python=$(find_python); then
        apt_install python3.11 python3.11-venv || true
        python=$(find_python) ||
            die "no Python 3.11 or newer; install it: apt-get install python3.11 python3.11-venv"
    fi
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    [ "$version" = 3.11 ] || say "using Python $version; constraints.txt was made for 3.11"
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        apt_install "python$version-venv" ||
            die "Python's venv module is missing; install it: apt-get install python$version-venv"
    fi
    "$python" -m venv --clear "$VENV"
}

# What the environment depends on: an edit of any of it, or a moved folder, installs again.
fingerprint() {
    {
        pwd
        echo "$EXTRAS"
        cat pyproject.toml constraints.txt
        cat CMakeLists.txt cmake/*.cmake csrc/* 2>/dev/null || true
    } | sha256sum | cut -d ' ' -f 1
}

# A compiler and Python's headers, for the native kernels. Everything else works without them.
compiler() {
    local version
    if command -v c++ >/dev/null && "$VENV/bin/python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))'; then
        return
    fi
    version=$("$VENV/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    apt_install g++ "python$version-dev" ||
        say "no C++ compiler or Python headers: going on without the native kernels;" \
            "to have them: apt-get install g++ python$version-dev, then make setup again"
}

# There is an environment, its Python runs, and it was made in this very folder.
healthy() {
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 &&
        grep -qF "$PWD/$VENV" "$VENV/bin/activate"
}

venv() {
    local wanted
    wanted=$(fingerprint)
    if [ -f "$STAMP" ] && [ "$(cat "$STAMP")" = "$wanted" ]; then
        return
    fi
    healthy || make_venv
    compiler
    say "installing omega-qvla[$EXTRAS] into $VENV (minutes the first time)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check \
        --constraint constraints.txt --editable ".[$EXTRAS]" ||
        die "pip failed; mend what it says above and run make again"
    printf '%s\n' "$wanted" > "$STAMP"
}

# The same question that omega_qvla.envs.rendering asks.
has_gl() {
    "$VENV/bin/python" -c 'import sys
from ctypes.util import find_library
sys.exit(not (find_library("OSMesa") or find_library("EGL")))'
}

gl() {
    if [ -n "${MUJOCO_GL:-}" ] || has_gl; then
        return
    fi
    apt_install libosmesa6 || apt_install libegl1 libgl1-mesa-dri || true
    has_gl || die "no library for headless rendering; install one: apt-get install libosmesa6" \
        "(or libegl1), or set MUJOCO_GL"
}

case "${1:-}" in
    venv) venv ;;
    gl) gl ;;
    *) die "usage: scripts/setup.sh venv|gl" ;;
esac
