"""The sdist and the wheel: what is in them, and a step from an installed wheel, far from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path
from typing import NamedTuple

import pytest

from bnb_compile.version import VERSION

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="not run from a source tree"),
]

#: What setuptools adds to an sdist.
GENERATED = {"PKG-INFO", "setup.cfg"}
#: The links at the root lead into the package.
LINKS = {"lowering", "ops"}


class Built(NamedTuple):
    sources: set[str]
    sdist: Path
    wheel: Path


def sources() -> set[str]:
    """Files of the source tree, a checkout or an unpacked sdist."""
    if (ROOT / ".git").exists():
        command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        return {name for name in names.splitlines() if os.path.lexists(ROOT / name)}
    found = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()}
    return {
        name for name in found if "__pycache__" not in name and ".egg-info/" not in name and name[0] != "."
    }


def build(what: str, source: Path, out: Path) -> Path:
    """Call the build backend as any frontend does, without a network."""
    code = f"from setuptools import build_meta as b; print(b.build_{what}({str(out)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An sdist of a copy of the source tree, and a wheel of what is in that sdist."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("packaging")
    names = sources()
    for name in names:
        copy = folder / "source" / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    sdist = build("sdist", folder / "source", folder)
    with tarfile.open(sdist) as tar:
        tar.extractall(folder, filter="data")
    return Built(names, sdist, build("wheel", folder / sdist.name.removesuffix(".tar.gz"), folder))


def test_the_sdist_has_the_package_its_tests_and_what_they_read(built: Built) -> None:
    with tarfile.open(built.sdist) as tar:
        names = {member.name for member in tar if not member.isdir()}
    top = f"bnb_compile-{VERSION}/"
    assert all(name.startswith(top) for name in names)
    found = {name.removeprefix(top) for name in names}
    found = {name for name in found if not name.startswith("bnb_compile.egg-info/")}
    expected = {name for name in built.sources if name[0] != "."}
    assert found - GENERATED == expected - GENERATED - LINKS


def test_the_wheel_has_the_package_and_nothing_else(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as archive:
        names = set(archive.namelist())
        info = f"bnb_compile-{VERSION}.dist-info/"
        metadata = message_from_string(archive.read(info + "METADATA").decode())
        top_level = archive.read(info + "top_level.txt").decode().split()
    of_package = {name for name in built.sources if name.startswith("bnb_compile/")}
    assert {Path(name).suffix for name in of_package} == {".py", ".h", ".typed"}
    more = ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")
    assert names == of_package | {info + name for name in more}
    assert top_level == ["bnb_compile"]
    assert metadata["Version"] == VERSION and metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.10"
    needed = [x for x in metadata.get_all("Requires-Dist", []) if "extra ==" not in x]
    assert [x.partition(">=")[0] for x in needed] == ["torch", "triton", "typing-extensions"]


def test_every_folder_of_the_package_is_a_package(built: Built) -> None:
    folders = {Path(name).parent for name in built.sources if name.startswith("bnb_compile/")}
    assert {str(folder / "__init__.py") for folder in folders} <= built.sources


STEP = """
import importlib.metadata, torch, bnb_compile
from bnb_compile import backends
param = torch.ones(5000, requires_grad=True)
param.grad = torch.ones(5000)
bnb_compile.optim.AdamW8bit([param], lr=0.1, compile=True).step()
assert (param < 0.95).all(), param
print(bnb_compile.__file__, importlib.metadata.version("bnb_compile"), backends.counts["kernel"])
"""


def test_an_installed_wheel_steps(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("pip")
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = "-m pip install --quiet --disable-pip-version-check --no-deps --no-index --target".split()
    subprocess.run([sys.executable, *install, str(site), str(built.wheel)], check=True, timeout=300)
    done = subprocess.run(
        [sys.executable, "-c", STEP],
        capture_output=True,
        text=True,
        cwd=elsewhere,
        env={**os.environ, "PYTHONPATH": str(site)},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / "bnb_compile" / "__init__.py"), VERSION, "1"]


def test_the_version_is_the_same_everywhere() -> None:
    (newest, *_) = re.findall(r"^## (\S+) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    cited = dict(re.findall(r"^([\w-]+): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert newest == (VERSION, cited["date-released"])
    assert cited["version"] == VERSION
