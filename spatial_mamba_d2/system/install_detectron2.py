"""Install Detectron2 into the environment of the running Python, which needs nothing but pip or uv.

    python -m spatial_mamba_d2.system.install_detectron2

``dev.py`` runs this during setup, and the doctor recommends it where Detectron2 is missing. The
version of Detectron2 is pinned here and nowhere else.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from .installer import pip_command

GIT_URL = "https://github.com/facebookresearch/detectron2"
GIT_COMMIT = "a59f05630a8f205756064244bf5beb8661f96180"
# That commit as a wheel on PyPI, except for three small edits; needs neither git nor a compiler. It
# is tagged for Python 3.10 because of its extension module detectron2/_C, which was built for
# another PyTorch and is not needed. The rest is pure Python, plus a top-level package "tools".
WHEEL = "sal-detectron2==0.7.2"
WHEEL_SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"


def pip(*arguments: str | Path) -> int:
    """Print and run a pip command, and return its exit code."""
    command = pip_command(*map(str, arguments))
    print("$", shlex.join(command), flush=True)
    env = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", **os.environ}
    return subprocess.run(command, env=env).returncode


def succeeds(*command: str, timeout: float | None = None) -> bool:
    """Whether a command exits with 0 within ``timeout`` seconds; its output is discarded."""
    env = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}  # otherwise git may ask for a password
    null = subprocess.DEVNULL
    try:
        done = subprocess.run(command, env=env, timeout=timeout, stdout=null, stderr=null)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def can_build() -> bool:
    """Whether upstream can be reached and built; its ``setup.py`` always compiles C++."""
    compiler = os.environ.get("CXX") or ("cl" if os.name == "nt" else "c++")
    return bool(
        shutil.which("git")
        and shutil.which(compiler.split()[0])
        and succeeds("git", "ls-remote", GIT_URL, "HEAD", timeout=10)
    )


def install_upstream() -> int:
    """Build the pinned commit, and return pip's exit code."""
    # pyproject.toml lists Detectron2's dependencies, hence --no-deps.
    source = f"detectron2 @ git+{GIT_URL}@{GIT_COMMIT}"
    return pip("install", "--no-deps", "--no-build-isolation", source)


def site_packages() -> Path:
    """Where pip would install: the environment, or the user's folder if that is read-only."""
    folder = Path(sysconfig.get_path("purelib"))
    if site.ENABLE_USER_SITE and not os.access(folder, os.W_OK):
        folder = Path(site.getusersitepackages())
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def install_wheel() -> int:
    """Install the wheel without its extension module, and return pip's exit code."""
    destination = site_packages()
    # Python sees the package only once it is complete, even if this process is killed.
    with tempfile.TemporaryDirectory(prefix=".detectron2-", dir=destination) as workspace:
        requirement, unpacked = Path(workspace, "requirement.txt"), Path(workspace, "unpacked")
        # pip accepts a hash in a file only.
        requirement.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
        code = pip(
            *("install", "--no-deps", "--only-binary=:all:", "--python-version", "3.10"),
            *("--target", unpacked, "-r", requirement),
        )
        if code:
            return code
        for library in unpacked.glob("detectron2/_C.*"):
            library.unlink()
        for info in unpacked.glob("*.dist-info"):
            correct_metadata(info)
        # A Detectron2 that cannot be imported may be in the way.
        pip("uninstall", "--yes", "detectron2", WHEEL.partition("==")[0])
        for folder in (*unpacked.glob("*.dist-info"), unpacked / "detectron2"):
            shutil.rmtree(destination / folder.name, ignore_errors=True)
            folder.replace(destination / folder.name)
    return 0


def correct_metadata(info: Path) -> None:
    """Let the wheel's metadata say what is installed, for ``pip check`` and ``pip uninstall``.

    It runs with any version of NumPy, which the tests show, and without the extension module on any
    Python and platform; ``tools`` is left out.

    Args:
        info: the folder ``*.dist-info``.
    """
    changes = {
        "METADATA": (r"^Requires-Dist: numpy\b.*$", "Requires-Dist: numpy"),
        "WHEEL": (r"^Tag: .*$", "Tag: py3-none-any"),
    }
    records = {}
    for name, (pattern, line) in changes.items():
        text = (info / name).read_text(encoding="utf-8")
        content = re.sub(pattern, line, text, flags=re.MULTILINE).encode()
        (info / name).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        records[f"{info.name}/{name}"] = f"sha256={digest},{len(content)}"
    kept = []
    for line in (info / "RECORD").read_text(encoding="utf-8").splitlines():
        path, _, rest = line.partition(",")
        if path.startswith((f"{info.name}/", "detectron2/")) and "/_C." not in path:
            kept.append(f"{path},{records.get(path, rest)}\n")
    (info / "RECORD").write_text("".join(kept), encoding="utf-8")


def main() -> int:
    """Keep a working Detectron2, otherwise build upstream, otherwise install the wheel."""
    if succeeds(sys.executable, "-c", "import detectron2.engine"):
        return 0
    if can_build() and install_upstream() == 0:
        return 0
    return install_wheel()


if __name__ == "__main__":
    sys.exit(main())
