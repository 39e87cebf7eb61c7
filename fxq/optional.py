"""Loading packages that fxq can do without, or explaining what to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingDependencyError

__all__ = ["require"]


def require(module: str, *, purpose: str, extra: str | None = None, package: str | None = None) -> ModuleType:
    """Import a module that may not be installed.

    Args:
        module: What to import, for example ``"tensorrt"``; dots are allowed.
        purpose: What it is needed for, as in "building an engine"; it becomes part of the message.
        extra: fxq's extra that installs it, for example ``"trt"``.
        package: The distribution to install where no extra has it. Defaults to the top of ``module``.

    Returns:
        The imported module.

    Raises:
        MissingDependencyError: The module, or something that it imports, is not installed or does not load;
            the message says which and what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        top = module.partition(".")[0]
        install = f"pip install 'fxq[{extra}]'" if extra else f"pip install {package or top}"
        absent = isinstance(error, ModuleNotFoundError) and error.name in {module, top}
        if absent:
            message = f"{purpose} needs the package {package or top}, which is not installed"
        else:
            message = f"{purpose} needs {module}, which is installed but does not load: {error}"
        raise MissingDependencyError(message, hint=install) from error
