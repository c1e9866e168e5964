"""What is said of a release in more than one place is the same everywhere."""

import pathlib
import re
import tomllib

import conv3dt_jax as c3t

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = (ROOT / "CITATION.cff").read_text()


def cited(field: str) -> str:
    """The value of a field at the top level of the citation file."""
    (value,) = re.findall(rf"^{field}: (.*)$", CITATION, re.MULTILINE)
    return value.strip('"')


def test_the_citation_is_of_this_version() -> None:
    assert cited("version") == c3t.__version__


def test_the_citation_says_what_the_metadata_say() -> None:
    assert cited("abstract") == PROJECT["description"]
    assert cited("license") == PROJECT["license"]
    authors = [f"  - name: {author['name']}" for author in PROJECT["authors"]]
    assert authors == re.findall(r"^  - name: .*$", CITATION, re.MULTILINE)
