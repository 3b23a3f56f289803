"""A tiny model that reads and writes text, and a server of it on a socket of its own."""

import threading
import time
from contextlib import contextmanager
from functools import lru_cache

import uvicorn

from tests.worlds import random_lora, random_transformer, tiny_config
from trimode.checkpoint import open_checkpoint
from trimode.engine.engine import EngineLimits
from trimode.engine.language_model import LanguageModel
from trimode.server.run import configured
from trimode.server.service import Service


@lru_cache(maxsize=1)
def tiny_text_model():
    """Random weights behind the embedded model's tokenizer: noise for text, but always the same noise."""
    checkpoint = open_checkpoint("smollm2-135m")
    real = checkpoint.config
    config = tiny_config(
        vocab_size=real.vocab_size,
        eos_token_ids=real.eos_token_ids,
        bos_token_id=real.bos_token_id,
        mask_token_id=real.mask_token_id,
        max_positions=2048,
    )
    return LanguageModel("tiny", random_transformer(config, 3), checkpoint.tokenizer(), adapter=random_lora(config))


@contextmanager
def serving(model=None, *, engine=None, **settings):
    """A running server; gives its address and its service."""
    service = Service(model or tiny_text_model(), engine_limits=EngineLimits(**(engine or {})), **settings)
    config = configured(service)
    server = uvicorn.Server(config)
    config.port = 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        service.cancel_all()
        thread.join(timeout=20)
        assert not thread.is_alive()
