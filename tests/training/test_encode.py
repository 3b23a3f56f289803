"""Chats and texts become the ids that the same chat gives at inference."""

import pytest

from trimode.checkpoint import open_checkpoint
from trimode.engine.prompts import encode_prompt
from trimode.errors import DataError
from trimode.text.tokenizer import Tokenizer
from trimode.training.encode import make_encode


@pytest.fixture(scope="module")
def preset():
    return open_checkpoint("smollm2-135m")


def test_a_chat_is_given_up_to_its_answer(preset):
    tokenizer = Tokenizer.from_gguf_metadata(preset.gguf_metadata)
    question = {"role": "user", "content": "What is 2 + 2?"}
    ids, given = make_encode(preset)([question, {"role": "assistant", "content": "It is 4."}])
    assert tuple(ids[:given]) == encode_prompt([question], tokenizer, preset.config)
    assert tokenizer.decode(ids[given:]).strip() == "It is 4."
    assert preset.config.eos_token_ids[0] in ids[given:]


def test_a_text_is_learnt_whole(preset):
    tokenizer = Tokenizer.from_gguf_metadata(preset.gguf_metadata)
    ids, given = make_encode(preset)("Once upon a time")
    assert given == 0
    assert tokenizer.decode(ids) == "Once upon a time"


@pytest.mark.parametrize(
    "messages", [5, [], ["hello"], [{"role": "user", "content": "?"}], [{"role": "assistant", "content": "!"}]]
)
def test_a_chat_without_an_answer_is_refused(preset, messages):
    with pytest.raises(DataError):
        make_encode(preset)(messages)
