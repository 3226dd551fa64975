"""Versions that are known to break, caught before they do."""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version


def check_versions() -> None:
    """Warn in one line where the installed apache-tvm-ffi crashes MetaSchedule."""
    try:
        installed = version("apache-tvm-ffi")
    except PackageNotFoundError:
        return
    major_minor = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if major_minor >= (0, 1, 15):
        warnings.warn(
            f"apache-tvm-ffi {installed} crashes MetaSchedule of apache-tvm 0.27; "
            "pip install 'apache-tvm-ffi>=0.1.14.post0,<0.1.15'",
            stacklevel=3,
        )
