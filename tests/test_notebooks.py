"""The stored notebooks: executed in order, with their pictures, and nothing of the machine that ran them."""

import json
import pathlib
import re

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_500_000

if not FOLDER.is_dir():
    pytest.skip("the sdist leaves the notebooks out", allow_module_level=True)


def cells_of(path: pathlib.Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def outputs_of(path: pathlib.Path) -> list[dict]:
    return [output for cell in cells_of(path) for output in cell.get("outputs", ())]


by_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_seven_in_order() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == [f"{number}_" for number in range(1, 8)]


@by_notebook
def test_it_is_stored_as_it_runs_from_top_to_bottom(path) -> None:
    code = [cell for cell in cells_of(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert all(cell["source"] for cell in code)


@by_notebook
def test_it_shows_pictures_and_no_errors(path) -> None:
    outputs = outputs_of(path)
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", ()))
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert path.stat().st_size <= MOST_BYTES


@by_notebook
def test_it_checks_what_it_says(path) -> None:
    """A notebook that runs is a test of its claims."""
    assert sum("assert " in "".join(cell["source"]) for cell in cells_of(path)) >= 3


@by_notebook
def test_it_names_no_path_of_a_machine(path) -> None:
    text = json.dumps([cell["source"] for cell in cells_of(path)]) + json.dumps(
        [
            {k: v for k, v in o.get("data", {}).items() if k.startswith("text/")} | {"": o.get("text", "")}
            for o in outputs_of(path)
        ]
    )
    assert not re.search(r"/(home|root|tmp|usr|work|Users)/", text)


@by_notebook
def test_its_links_lead_somewhere(path) -> None:
    text = "\n".join("".join(cell["source"]) for cell in cells_of(path) if cell["cell_type"] == "markdown")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (FOLDER / target).exists(), target
