"""Other libraries, each family in an environment of its own outside the repository, made on first use.

Their torch is the very one that runs this benchmark: the environment looks into the present one's packages, and only
the small packages named here are installed, without what they would like to bring along (torchvision, TensorFlow).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CONSTRAINTS = Path(__file__).parent.parent / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """Packages that get along, and the methods that need them.

    Attributes
    ----------
    packages
        Installed without their dependencies.
    complete
        Installed with them.
    module
        Whose METHODS they are.
    with_torch
        Whether the present environment's packages are visible.
    """

    name: str
    module: str
    packages: tuple[str, ...]
    complete: tuple[str, ...] = ()
    with_torch: bool = True

    @property
    def folder(self) -> Path:
        """A new folder for every change of what is installed."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        wanted = repr((self, sys.version, sysconfig.get_paths()["purelib"], CONSTRAINTS.read_text()))
        return cache / "pathkernel" / "peers" / f"{self.name}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}"

    @property
    def python(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    def make(self, say: Callable[[str], None]) -> dict[str, str]:
        """Create what is missing; what could not be installed, and why."""
        done = self.folder / "complete"
        if done.exists():
            return dict(line.split(": ", 1) for line in done.read_text().splitlines())
        say(f"installing {', '.join(self.packages + self.complete)} into {self.folder}")
        venv.create(self.folder, clear=True, with_pip=True)
        if self.with_torch:
            libraries = subprocess.check_output(
                [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
            )
            # After the environment's own packages on the path: what is installed here comes first.
            link = Path(libraries.strip()) / "present_environment.pth"
            link.write_text(sysconfig.get_paths()["purelib"] + "\n")
        failed = {}
        for package, dependencies in [(p, ()) for p in self.complete] + [(p, ("--no-deps",)) for p in self.packages]:
            pip = [self.python, "-m", "pip", "install", "-q", "-c", CONSTRAINTS, *dependencies, package]
            result = subprocess.run(pip, capture_output=True, text=True, check=False)
            if result.returncode:
                failed[package] = (result.stderr.strip().splitlines() or ["pip failed"])[-1][:200]
        done.write_text("".join(f"{package}: {reason}\n" for package, reason in failed.items()))
        return failed

    def versions(self) -> str:
        """Installed versions, in words."""
        names = [package.split("==")[0].split("[")[0] for package in (*self.packages, *self.complete)]
        code = (
            "from importlib.metadata import version\n"
            f"for name in {names!r}:\n"
            "    try: print(name, version(name))\n"
            "    except Exception: pass"
        )
        return ", ".join(subprocess.check_output([self.python, "-c", code], text=True).splitlines())


ENVIRONMENTS = [
    Environment(
        "torch",
        "_peers_torch",
        (
            *("nngeometry==0.4", "asdfghjkl==0.1a5", "captum==0.9.0", "dattri==0.3.0"),
            *("backpack-for-pytorch==1.7.1", "einops==0.8.2", "unfoldNd==0.2.3"),
            *("opacus==1.6.0", "opt-einsum==3.4.0"),
        ),
    ),
    # 0.4.38 is the newest jax that neural-tangents 0.6.5 can be imported with.
    Environment("jax", "_peers_jax", ("neural-tangents==0.6.5",), ("jax[cpu]==0.4.38", "frozendict"), False),
]

METHODS = {
    "torch": ("nngeometry", "asdfghjkl", "backpack", "opacus", "captum", "captum-default", "dattri", "dattri-batches"),
    "jax": ("neural-tangents-contraction", "neural-tangents-products", "neural-tangents-structured"),
}
"""By environment; each runs in a process of its own."""
