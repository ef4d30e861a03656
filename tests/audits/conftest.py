import pytest

from expunge.audits import Subjects

from .helpers import digits


@pytest.fixture
def toy():
    return digits()


@pytest.fixture
def audit(toy):
    """Subjects where nothing was unlearned: the unlearned model is the original."""
    return Subjects(toy["case"], toy["original"], toy["original"], toy["retrained"], toy["floor"], resamples=50)
