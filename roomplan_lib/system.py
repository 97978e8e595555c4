"""This machine: the libraries that Open3D needs, local scratch for caches, memory, free ports.

`python -m roomplan_lib.system` makes `import open3d` work or says how; with --caches it prints the settings of
`local_caches` for a shell.
"""

from __future__ import annotations

import getpass
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

# Debian's names of the system libraries that Open3D's wheels expect.
DEBIAN_PACKAGES = {
    "libusb-1.0.so.0": "libusb-1.0-0",
    "libGL.so.1": "libgl1",
    "libEGL.so.1": "libegl1",
    "libX11.so.6": "libx11-6",
    "libgomp.so.1": "libgomp1",
}


def missing_library() -> str | None:
    """Name of the shared library that `import open3d` lacks, None when it works. RuntimeError for other failures."""
    result = subprocess.run([sys.executable, "-c", "import open3d"], capture_output=True, text=True)
    if result.returncode == 0:
        return None
    found = re.search(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file", result.stderr)
    if not found:
        raise RuntimeError(f"import open3d fails:\n{result.stderr}")
    return found.group(1)


def scratch_folder() -> Path:
    """This user's folder on a disk of this machine: below $SLURM_TMPDIR, else $TMPDIR, else /tmp."""
    base = os.environ.get("SLURM_TMPDIR") or tempfile.gettempdir()
    return Path(base) / f"roomplan-{getpass.getuser()}"


def local_caches() -> dict[str, str]:
    """Settings that move the caches of Hugging Face, torch, Triton and CUDA to local scratch, as far as none is set.

    Home folders of clusters are small, slow and shared by all ranks. What was downloaded there is still found: models
    (HF_HUB_CACHE) and the hub's login (HF_TOKEN_PATH) stay where they are if there are any.
    """
    scratch = scratch_folder()
    wanted = {
        "HF_HOME": scratch / "huggingface",
        "TORCH_HOME": scratch / "torch",
        "TORCH_EXTENSIONS_DIR": scratch / "torch_extensions",
        "TORCHINDUCTOR_CACHE_DIR": scratch / "torchinductor",
        "TRITON_CACHE_DIR": scratch / "triton",
        "CUDA_CACHE_PATH": scratch / "cuda",
    }
    if "HF_HOME" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "huggingface"
        wanted |= {
            name: path
            for name, path in (("HF_HUB_CACHE", home / "hub"), ("HF_TOKEN_PATH", home / "token"))
            if path.exists()
        }
    return {name: str(path) for name, path in wanted.items() if name not in os.environ}


def available_memory() -> int:
    """Bytes that this process may still take: the machine's free memory, or less where a cgroup allows less."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    group = Path("/proc/self/cgroup").read_text().strip().rsplit(":", 1)[-1].lstrip("/")  # cgroup 2: one line, 0::/path
    for folder in (Path("/sys/fs/cgroup") / group, *(Path("/sys/fs/cgroup") / group).parents):
        limit, used = folder / "memory.max", folder / "memory.current"
        if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
            free = min(free, int(text) - int(used.read_text()))
    return free


def peak_memory() -> int:
    """Bytes that this program has held at most. (getrusage would count what its parent held when it was started.)"""
    return _own_memory("VmHWM")


def held_memory() -> int:
    """Bytes that this program holds now."""
    return _own_memory("VmRSS")


def _own_memory(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0]) * 1024


def free_port() -> int:
    """A TCP port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Installs each missing library where this user may, else prints the command; exit status."""
    if "--caches" in sys.argv[1:]:
        print("\n".join(f"export {name}={shlex.quote(path)}" for name, path in local_caches().items()))
        return 0
    for _ in range(len(DEBIAN_PACKAGES) + 1):
        library = missing_library()
        if library is None:
            return 0
        package = DEBIAN_PACKAGES.get(library)
        command = f"apt-get update && apt-get install -y {package}"
        if package and os.geteuid() == 0 and shutil.which("apt-get"):
            print(f"open3d needs {library}: {command}")
            options = "-o DPkg::Lock::Timeout=300"
            full = f"apt-get update -qq && apt-get {options} install -y -qq --no-install-recommends {package}"
            if subprocess.run(full, shell=True, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}).returncode:
                print(f"that failed; run: sudo sh -c '{command}'")
                return 1
        else:
            advice = f"run: sudo sh -c '{command}'" if package else "install the system package that holds it"
            print(f"open3d needs {library}; {advice}")
            return 1
    return 1


if __name__ == "__main__":
    sys.exit(main())
