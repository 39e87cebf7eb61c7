"""What is checked out, what is declared and what a wheel holds are the same thing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fxq

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
REQUIREMENT = re.compile(r"^[A-Za-z0-9._-]+")


def normal(name: str) -> str:
    """A distribution's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def package_files() -> set[str]:
    """Every file of the packages, by its path in a wheel. Links are not followed."""
    files = set()
    for package, folder in FOLDERS.items():
        for path in (ROOT / folder).iterdir():
            if path.is_file() and path.suffix != ".pyc":
                files.add(f"{package.replace('.', '/')}/{path.name}")
    return files


@pytest.mark.parametrize("folder", ["passes", "backends"])
def test_link_leads_to_the_mapped_folder(folder: str) -> None:
    link = ROOT / "fxq" / folder
    if not link.is_symlink():
        pytest.skip(f"fxq/{folder} is no link here, as in a source distribution")
    assert str(link.readlink()) == f"../{folder}"
    assert link.resolve() == ROOT / FOLDERS[f"fxq.{folder}"]


def test_declared_packages_are_the_folders_that_hold_python() -> None:
    assert sorted(PROJECT["tool"]["setuptools"]["packages"]) == sorted(FOLDERS)
    tops = [ROOT / folder for folder in FOLDERS.values()]
    holding = {
        path.parent
        for top in tops
        for path in top.rglob("*.py")
        if not path.relative_to(top).is_relative_to("__pycache__")
    }
    linked = {
        ROOT / "fxq" / "passes",
        ROOT / "fxq" / "backends",
    }  # newer Pythons do not follow them, older ones may
    assert sorted(holding - linked) == sorted(tops)


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_bare_names_do_not_import(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {name}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert f"No module named '{name}'" in done.stderr


def test_installed_package_imports_from_anywhere(tmp_path: Path) -> None:
    try:
        metadata.version("fxq")
    except metadata.PackageNotFoundError:
        pytest.skip("fxq is not installed in this environment, only on the path")
    program = "import fxq, fxq.passes, fxq.optional; print(fxq.__file__)"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and a source distribution, built from a copy and without the network."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in (
        "pyproject.toml",
        "MANIFEST.in",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "Makefile",
        "constraints.txt",
    ):
        shutil.copy(ROOT / name, copy / name)
    for name in ("fxq", "passes", "backends", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    program = "from setuptools import build_meta; build_meta.build_wheel('dist'); build_meta.build_sdist('dist')"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return copy / "dist"


def test_wheel_holds_the_packages_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    information = {name for name in names if ".dist-info/" in name}
    assert names - information == package_files()
    assert any(name.endswith("/LICENSE") for name in information)
    assert "fxq/py.typed" in names


def test_source_distribution_mirrors_the_checkout(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    mapped = {
        f"{FOLDERS[package]}/{Path(file).name}"
        for file in package_files()
        for package in FOLDERS
        if str(Path(file).parent) == package.replace(".", "/")
    }
    assert mapped <= names
    assert {"Makefile", "constraints.txt", "tests/conftest.py", "tests/support/trt_shim/nvinfer.c"} <= names


def test_every_dependency_is_pinned_for_the_tests() -> None:
    pins = {
        normal(line.partition("==")[0])
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    project = PROJECT["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {normal(match[0]) for line in declared if (match := REQUIREMENT.match(line))}
    assert len(names) > 15
    assert sorted(names - pins) == []
    assert "torchvision" not in names | pins  # it would choose a torch of its own


def test_heavy_and_optional_packages_are_not_dependencies() -> None:
    dependencies = " ".join(PROJECT["project"]["dependencies"])
    assert "tensorrt" not in dependencies
    assert PROJECT["project"]["optional-dependencies"]["trt"] == ["tensorrt>=10.12,<12"]


def test_version_is_the_same_everywhere() -> None:
    version = PROJECT["project"]["version"]
    assert fxq.__version__ == version
    assert re.search(rf"^## {re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
