"""Builds what a release uploads, and tries it: `make release-check`, or `python .ci/release_check.py --help`.

The sdist and the wheel must hold the tracked files and no others, with metadata that is valid. Then, in an empty
environment for every Python that the classifiers name, the tests of the sdist run against the installed wheel, without
any extra: with the newest versions of the dependencies, and on the oldest Python with the oldest declared ones too.
"""

import argparse
import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).resolve().parents[1]
OUT = ROOT / "out" / "release"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = SETTINGS["project"]
PACKAGE = "conv3dt_jax"


def name_of(requirement: str) -> str:
    """Of `flax>=0.12.6`, `flax`."""
    return re.split(r"[^\w-]", requirement)[0]


PYTHONS = [
    m[1] for c in PROJECT["classifiers"] if (m := re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", c))
]
DEPENDENCIES = [name_of(requirement) for requirement in PROJECT["dependencies"]]
TOOLS = ("pytest", "pytest-xdist", "hypothesis")
LARGEST_SDIST = 5_000_000  # bytes

# Runs in the environment, isolated: what is imported lies there, has the declared version, and needs no extra.
SMOKE = f"""
import importlib.metadata, pathlib, sys
import {PACKAGE} as package
assert pathlib.Path(package.__file__).is_relative_to(sys.prefix), package.__file__
assert package.__version__ == importlib.metadata.version({PROJECT["name"]!r})
for name in package.__all__:
    getattr(package, name)
print(*(f"{{name}} {{importlib.metadata.version(name)}}" for name in {DEPENDENCIES}), sep=", ")
"""


class CheckError(Exception):
    """Something that must be mended before a release."""


def run(*command: str | pathlib.Path, cwd: pathlib.Path = OUT, **variables: str) -> str:
    """What the command prints."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment |= {"PIP_NO_CACHE_DIR": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONNOUSERSITE": "1", **variables}
    words = [str(part) for part in command]
    done = subprocess.run(words, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise CheckError(f"{done.stdout[-6000:]}\n{' '.join(words)[:300]}: exit status {done.returncode}")
    return done.stdout


def build() -> tuple[pathlib.Path, pathlib.Path]:
    """The sdist, and the wheel that is built from it."""
    dist = OUT / "dist"
    run(sys.executable, "-m", "build", "--outdir", dist, ROOT)
    (sdist,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    return sdist, wheel


def same(what: str, found: set[str], wanted: set[str]) -> None:
    if found != wanted:
        raise CheckError(f"{what} lacks {sorted(wanted - found)} and should not hold {sorted(found - wanted)}")


def check_contents(sdist: pathlib.Path, wheel: pathlib.Path) -> None:
    """Both hold the tracked files that pyproject.toml names, and no others."""
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    included = [name.strip("/") for name in SETTINGS["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]]
    for name in included:
        if not any(file == name or file.startswith(f"{name}/") for file in tracked):
            raise CheckError(f"pyproject.toml puts {name} into the sdist, but git tracks no such file")
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    of_source = {file for file in tracked if file in included or file.partition("/")[0] in included}
    same("the sdist", files - {"PKG-INFO", ".gitignore", "pyproject.toml"}, of_source - {"pyproject.toml"})
    with zipfile.ZipFile(wheel) as archive_of_wheel:
        names = set(archive_of_wheel.namelist())
    modules = {name for name in names if not re.match(rf"{PACKAGE}-[^/]+\.dist-info/", name)}
    same("the wheel", modules, {file for file in tracked if file.startswith(f"{PACKAGE}/")})
    if "Typing :: Typed" in PROJECT["classifiers"] and f"{PACKAGE}/py.typed" not in names:
        raise CheckError("the package says that it is typed, but the wheel lacks py.typed")
    if sdist.stat().st_size > LARGEST_SDIST:
        raise CheckError(f"the sdist takes {sdist.stat().st_size} bytes; {LARGEST_SDIST} are the most")


def candidates(version: str) -> Iterator[pathlib.Path]:
    """Where a Python of this version may be: on the PATH, and among those of pyenv, the newest first."""
    if found := shutil.which(f"python{version}"):
        yield pathlib.Path(found)
    root = pathlib.Path(os.environ.get("PYENV_ROOT") or pathlib.Path.home() / ".pyenv")
    patch = re.compile(rf"{re.escape(version)}\.(\d+)")
    folders = [(int(m[1]), path) for path in root.glob("versions/*") if (m := patch.fullmatch(path.name))]
    yield from (path / "bin" / "python" for _, path in sorted(folders, reverse=True))


def find_python(version: str) -> pathlib.Path | None:
    """One that runs: a shim of pyenv may stand on the PATH for a Python that it does not run."""
    for path in candidates(version):
        try:
            words = run(path, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])")
        except (CheckError, OSError):
            continue
        if words.strip() == version:
            return path
    return None


def oldest() -> list[str]:
    """The dependencies, each at the lowest version that is declared."""
    pins = []
    for requirement in PROJECT["dependencies"]:
        match = re.fullmatch(r"([\w-]+)>=([\w.]+)", requirement)
        if match is None:
            raise CheckError(f"{requirement!r} in pyproject.toml does not say which version is the oldest")
        pins.append(f"{match[1]}=={match[2]}")
    return pins


def unpack(sdist: pathlib.Path, folder: pathlib.Path) -> pathlib.Path:
    """The sdist without the package: the tests can only find the installed one."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    shutil.rmtree(source / PACKAGE)
    return source


@dataclasses.dataclass(frozen=True)
class Trial:
    """One environment."""

    version: str
    base: pathlib.Path  # the interpreter
    pins: Sequence[str] = ()  # without any, the newest versions

    @property
    def name(self) -> str:
        return f"{self.version}-{'oldest' if self.pins else 'newest'}"


def test(trial: Trial, python: pathlib.Path, source: pathlib.Path, args: argparse.Namespace) -> str:
    """The last line of pytest; all of it is in the log."""
    # The examples of interop read and write files of the other frameworks.
    tests = ["tests", "--pyargs", PACKAGE, "--ignore-glob=/*/interop/*"]
    options = ["-q", "-n", str(args.workers), "--dist", "worksteal", "--basetemp", str(source.parent / "temporary")]
    # Packages of different ages use names of one another that are deprecated by now.
    variables = {"PYTEST_ADDOPTS": "-W ignore::DeprecationWarning"} if trial.pins else {}
    log = OUT / f"{trial.name}.log"
    try:
        output = run(python, "-m", "pytest", *tests, *options, cwd=source, **variables)
    except CheckError as error:
        log.write_text(str(error))
        raise
    log.write_text(output)
    return output.strip().splitlines()[-1].strip("= ")


def try_out(trial: Trial, sdist: pathlib.Path, wheel: pathlib.Path, args: argparse.Namespace) -> str:
    """Installs the wheel in an empty environment and runs the tests, then the sdist; what was run, and how it ended."""
    folder = OUT / trial.name
    try:
        run(trial.base, "-m", "venv", folder / "environment")
        python = folder / "environment" / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = (python, "-m", "pip")
        run(*pip, "install", "--quiet", wheel, *trial.pins)
        run(*pip, "check")
        number = run(python, "-c", "import platform; print(platform.python_version())").strip()
        what = f"{trial.name}: Python {number}, {run(python, '-I', '-W', 'ignore', '-c', SMOKE).strip()}"
        print(what, flush=True)
        tools = [need for need in PROJECT["optional-dependencies"]["test"] if name_of(need) in TOOLS]
        run(*pip, "install", "--quiet", *tools, *trial.pins)
        result = test(trial, python, unpack(sdist, folder / "sdist"), args)
        run(*pip, "install", "--quiet", "--no-deps", "--force-reinstall", sdist)
        run(python, "-I", "-W", "ignore", "-c", SMOKE)
        return f"{what}: {result}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pythons", nargs="+", choices=PYTHONS, default=PYTHONS, metavar="VERSION")
    parser.add_argument("--workers", type=int, default=2, help="processes that run tests")
    return parser.parse_args()


def main() -> int:
    args = parse()
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    sdist, wheel = build()
    check_contents(sdist, wheel)
    print(
        *(f"{path.name}, {path.stat().st_size} bytes: as it should be" for path in (sdist, wheel)), sep="\n", flush=True
    )
    found = {version: find_python(version) for version in args.pythons}
    trials = [Trial(version, path) for version, path in found.items() if path]
    trials += [Trial(first.version, first.base, oldest()) for first in trials if first.version == PYTHONS[0]]
    ended = []
    for trial in trials:
        try:
            ended.append(f"passed   {try_out(trial, sdist, wheel, args)}")
        except CheckError as error:
            print(error, file=sys.stderr)
            ended.append(f"FAILED   {trial.name}; see above")
    ended += [f"not run  {version}: no such Python was found" for version, path in found.items() if not path]
    print(*ended, sep="\n")
    return int(not trials or any(line.startswith("FAILED") for line in ended))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CheckError as error:
        sys.exit(f"release-check: {error}")
