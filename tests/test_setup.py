"""scripts/setup.sh on machines that lack something, played by programs that pretend."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "cat", "cut", "dirname", "env", "grep", "sha256sum")
NO_RENDERER = "apt-get install libosmesa6"


class Machine:
    """A repository with the script, and a PATH that holds only what a test puts there."""

    def __init__(self, folder: Path) -> None:
        self.repo, self.bin, self.log = folder / "repo", folder / "bin", folder / "log"
        (self.repo / "scripts").mkdir(parents=True)
        self.bin.mkdir()
        for file in ("scripts/setup.sh", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / file, self.repo / file)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found, tool
            (self.bin / tool).symlink_to(found)
        self.program("id", "echo 1000")

    def program(self, name: str, body: str, where: Path | None = None) -> None:
        """Put a shell script on the PATH (or into `where`)."""
        file = (where or self.bin) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!{self.bin / 'bash'}\n{body}\n")
        file.chmod(0o755)

    def venv_python(self, body: str) -> None:
        """A .venv whose python does `body`."""
        self.program("python", body, self.repo / ".venv" / "bin")

    def apt(self, body: str = "true") -> None:
        """An apt-get that writes down what it is asked and does `body`."""
        self.program("apt-get", f'echo "$@" >> "{self.log}"\n{body}')

    def setup(self, what: str, **environment: str) -> tuple[int, str]:
        """Run the script. Returns its exit code and what it said."""
        run = subprocess.run(
            [self.bin / "bash", self.repo / "scripts" / "setup.sh", what],
            env={"PATH": str(self.bin), **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        return run.returncode, run.stderr

    def asked(self) -> str:
        """What apt-get was asked for."""
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_no_python(machine: Machine) -> None:
    code, said = machine.setup("venv")
    assert code == 1
    assert "apt-get install python3.11 python3.11-venv" in said


def test_python_too_old_or_only_a_shim_is_passed_over(machine: Machine) -> None:
    machine.program("python3.11", "exit 127")
    machine.program("python3", "exit 1")
    code, said = machine.setup("venv")
    assert code == 1
    assert "no Python 3.11 or newer" in said


def test_no_venv_module(machine: Machine) -> None:
    machine.program(
        "python3.11", f'case "$*" in *ensurepip*) exit 1 ;; esac\nexec "{sys.executable}" "$@"'
    )
    code, said = machine.setup("venv")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert code == 1
    assert f"apt-get install python{version}-venv" in said


def test_renderer_present(machine: Machine) -> None:
    machine.venv_python("exit 0")
    machine.apt()
    assert machine.setup("gl") == (0, "")
    assert not machine.asked()


def test_renderer_chosen_by_the_user(machine: Machine) -> None:
    assert machine.setup("gl", MUJOCO_GL="egl") == (0, "")


def test_renderer_missing_without_rights(machine: Machine) -> None:
    machine.venv_python("exit 1")
    machine.apt()
    code, said = machine.setup("gl")
    assert code == 1
    assert NO_RENDERER in said
    assert not machine.asked()


@pytest.mark.parametrize("root", [True, False])
def test_renderer_installed_with_rights(machine: Machine, root: bool, tmp_path: Path) -> None:
    library = tmp_path / "library"
    machine.venv_python(f'[ -e "{library}" ]')
    machine.apt(f'case "$*" in *libosmesa6*) : > "{library}" ;; esac')
    machine.program("id", "echo 0" if root else "echo 1000")
    if not root:
        machine.program("true", "exit 0")
        machine.program("sudo", 'shift; exec "$@"')
    code, said = machine.setup("gl")
    assert code == 0, said
    assert "install -y --no-install-recommends libosmesa6" in machine.asked()


def test_renderer_that_apt_does_not_have(machine: Machine) -> None:
    machine.venv_python("exit 1")
    machine.apt("exit 100")
    machine.program("id", "echo 0")
    code, said = machine.setup("gl")
    assert code == 1
    assert "libegl1" in machine.asked()  # the second choice was tried
    assert NO_RENDERER in said


def test_environment_is_made_once_and_again_after_a_change(machine: Machine) -> None:
    log = machine.repo / "pip.log"
    inside = 'case "$*" in *install*) echo "$@" >> pip.log ;; esac'
    machine.program("inside", inside)
    made = f'mkdir -p .venv/bin; cp "{machine.bin}/inside" .venv/bin/python'
    activate = 'echo "VIRTUAL_ENV=$PWD/.venv" > .venv/bin/activate'
    machine.program(
        "python3.11",
        f'case "$*" in *"-m venv"*) {made}; {activate} ;; *print*) echo 3.11 ;; esac',
    )
    for tool in ("mkdir", "cp"):
        (machine.bin / tool).symlink_to(shutil.which(tool) or tool)

    for _ in range(2):
        assert machine.setup("venv")[0] == 0
    (first,) = log.read_text().splitlines()
    assert "--constraint constraints.txt --editable" in first
    assert ".[checkpoints,lerobot,metaworld,report,serve,video,dev]" in first

    with (machine.repo / "constraints.txt").open("a") as file:
        file.write("# changed\n")
    assert machine.setup("venv")[0] == 0
    assert len(log.read_text().splitlines()) == 2


def test_wrong_use(machine: Machine) -> None:
    code, said = machine.setup("everything")
    assert code == 1
    assert "usage" in said
