"""Several machines, played by one: two replicas under Ray Serve, one of which dies while requests run."""

import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELLO = [{"role": "user", "content": "Hello"}]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def load_tiny(name):
    """What each replica loads."""
    import torch

    from tests.server.worlds import tiny_text_model

    torch.set_num_threads(1)
    return tiny_text_model()


@pytest.fixture
def url(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.syspath_prepend(str(ROOT))
    from ray import serve

    from deploy.ray_serve import build

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(model="tiny", replicas=2, load=load_tiny, num_cpus=0.5))
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


def replicas():
    import psutil

    return [p for p in psutil.Process().children(recursive=True) if "ServeReplica" in " ".join(p.cmdline())]


def test_a_replica_that_dies_while_requests_run_loses_none_of_them(url):
    import openai

    from tests.server.worlds import tiny_text_model

    expected = tiny_text_model().generate(HELLO, mode="ar", max_new_tokens=200, ignore_eos=True).text
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=8, timeout=60) as client:

        def ask(_):
            reply = client.chat.completions.create(
                model="tiny", messages=HELLO, max_tokens=200, extra_body={"mode": "ar", "ignore_eos": True}
            )
            return reply.choices[0].message.content

        assert ask(0) == expected
        chunks = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, stream=True)
        assert sum(1 for _ in chunks) >= 5
        before = replicas()
        assert len(before) == 2
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, i) for i in range(24)]
            time.sleep(0.7)
            assert not all(a.done() for a in asked)
            os.kill(before[0].pid, signal.SIGKILL)
            assert [a.result() for a in asked] == [expected] * 24
        end = time.monotonic() + 60
        while len(replicas()) < 2:
            assert time.monotonic() < end, "the lost replica did not come back"
            time.sleep(0.5)
        assert ask(0) == expected
