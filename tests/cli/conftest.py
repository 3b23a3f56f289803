"""Fixtures of the command line's tests: a fake model behind `trimode.load`, and the program run in this process."""

import sys
from dataclasses import dataclass

import pytest

import trimode
from tests.cli.fake_model import FakeModel
from trimode.cli.app import run


@dataclass(frozen=True)
class Ended:
    status: int
    stdout: str
    stderr: str


@pytest.fixture
def cli(capfd):
    """Run the program on these arguments; what it printed and how it ended."""

    def invoke(*arguments):
        status = run(arguments)
        printed = capfd.readouterr()
        return Ended(status, printed.out, printed.err)

    return invoke


@pytest.fixture
def use_model(monkeypatch):
    """Put a fake model behind `trimode.load`; `loads` lists the arguments that it was called with."""

    def put(**settings):
        model = FakeModel(**settings)
        model.loads = []

        def load(name, **arguments):
            model.loads.append((name, arguments))
            return model

        # Into the module's dict, so that a lazy module is not asked for the real one.
        monkeypatch.setitem(vars(trimode), "load", load)
        return model

    return put


@pytest.fixture
def model(use_model):
    return use_model()


@pytest.fixture
def no_model(monkeypatch):
    """Loading a model fails the test: the mistake should have been told before."""

    def load(name, **arguments):
        raise AssertionError("a model was loaded for nothing")

    monkeypatch.setitem(vars(trimode), "load", load)


@pytest.fixture
def type_in(monkeypatch):
    """Standard input holds these lines (None: it is closed)."""
    import io

    def put(*lines):
        text = None if lines == (None,) else io.StringIO("".join(f"{line}\n" for line in lines))
        monkeypatch.setattr(sys, "stdin", text)

    return put
