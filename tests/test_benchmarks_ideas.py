"""`benchmarks.ideas` undoes choices that are there."""

import pytest

pytest.importorskip("tqdm")

from benchmarks.ideas import IDEAS


@pytest.mark.parametrize("idea", IDEAS, ids=lambda idea: idea.name)
def test_an_idea_undoes_what_stands_in_the_package(idea) -> None:
    assert [f"{module.__name__}.{name}" for module, name, _ in idea.patches if not hasattr(module, name)] == []
