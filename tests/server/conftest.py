"""One server for all tests that do not change it."""

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

import httpx
import openai

from tests.server.worlds import serving, tiny_text_model


@pytest.fixture(scope="session")
def server():
    with serving() as (url, service):
        yield url, service


@pytest.fixture(scope="session")
def model():
    return tiny_text_model()


@pytest.fixture(scope="session")
def client(server):
    with openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def http(server):
    with httpx.Client(base_url=server[0], timeout=60) as http:
        yield http
