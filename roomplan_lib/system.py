"""Set-up check: `python -m roomplan_lib.system` makes `import open3d` work or says how."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

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


def main() -> int:
    """Installs each missing library where this user may, else prints the command; exit status."""
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
