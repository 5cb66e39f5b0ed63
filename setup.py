"""Puts the files that stand at the top of the checkout into a wheel, where `isotune.io.shipped` reads them.

Everything else about the package is in pyproject.toml. An editable install copies nothing: it reads the checkout.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = (
    "train/configs",
    "eval/configs",
    "eval/metrics",
    "accelerate_configs",
    "ds_configs",
    "slurm",
    "constraints.txt",
)


class BuildWithFiles(build_py):
    """build_py, and the shipped files in isotune/_files under the paths that they have in the checkout."""

    def run(self) -> None:
        """Build the package, then copy: what a build before this one left is removed first."""
        super().run()
        if self.editable_mode:
            return
        root = Path(self.build_lib, "isotune", "_files")
        shutil.rmtree(root, ignore_errors=True)
        for name in SHIPPED:
            source, target = Path(name), root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(source, target)


setup(cmdclass={"build_py": BuildWithFiles})
