"""The `openai` client works unchanged, and what it gets is what the library gives."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest

from trimode.server.wire import _cost

HELLO = [{"role": "user", "content": "Hello, who are you?"}]
MODES = ["ar", "self_spec", "diffusion"]


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_a_chat_is_answered_as_by_the_library(client, model, mode):
    reply = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=12, extra_body={"mode": mode})
    alone = model.generate(HELLO, mode=mode, max_new_tokens=12)
    assert reply.choices[0].message.content == alone.text
    assert reply.choices[0].finish_reason == alone.finish_reason
    assert reply.object == "chat.completion"
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (alone.stats.prompt_tokens, alone.stats.tokens)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.mode == alone.stats.mode
    assert usage.cost["nfe_decode"] == alone.stats.nfe_decode
    assert usage.cost["decode_tpf"] == pytest.approx(alone.stats.decode_tpf)
    assert usage.cost["acceptance_length"] == alone.stats.acceptance_length
    assert (
        usage.cost["self_spec_kind"] == alone.stats.self_spec_kind == ("linear" if usage.mode == "self_spec" else None)
    )
    # where rounds had lengths of their own, choices tells them
    assert (usage.cost["block_length"] is None) == (usage.mode == "ar" or usage.cost["choices"] is not None)


@pytest.mark.parametrize("mode", MODES)
def test_streamed_pieces_joined_are_the_answer_and_usage_comes_last(client, model, mode):
    stream = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=15,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"mode": mode},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    alone = model.generate(HELLO, mode=mode, max_new_tokens=15)
    assert text == alone.text
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == alone.finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == alone.stats.tokens
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_n_choices_of_one_seed_are_those_of_the_following_seeds(client, model):
    knobs = {"temperature": 1.0, "seed": 5}
    reply = client.chat.completions.create(model="tiny", messages=HELLO, n=3, max_tokens=8, **knobs)
    expected = [model.generate(HELLO, max_new_tokens=8, temperature=1.0, seed=5 + i).text for i in range(3)]
    assert [c.message.content for c in reply.choices] == expected
    assert [c.index for c in reply.choices] == [0, 1, 2]
    assert len(set(expected)) > 1
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(model="tiny", messages=HELLO, n=3, max_tokens=8, stream=True, **knobs):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == expected


def test_stop_logit_bias_and_penalties_reach_the_decoder(client, model):
    whole = model.generate(HELLO, mode="ar", max_new_tokens=12)
    stop = whole.text[8:12]
    cut = client.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=12, stop=[stop], extra_body={"mode": "ar"}
    )
    assert cut.choices[0].message.content == whole.text[: whole.text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    first = whole.token_ids[0]
    other = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=12,
        logit_bias={str(first): -100},
        presence_penalty=1.0,
        frequency_penalty=0.5,
        extra_body={"mode": "ar", "repetition_penalty": 1.1},
    )
    alone = model.generate(
        HELLO,
        mode="ar",
        max_new_tokens=12,
        logit_bias={first: -100},
        presence_penalty=1.0,
        frequency_penalty=0.5,
        repetition_penalty=1.1,
    )
    assert other.choices[0].message.content == alone.text != whole.text


@pytest.mark.parametrize(
    ("mode", "kind"), [("ar", "autoregressive"), ("self_spec", "autoregressive"), ("diffusion", "at_commit")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_librarys_and_say_what_they_are(client, model, mode, kind, stream):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    reply = client.chat.completions.create(**asked, stream=stream, extra_body={"mode": mode})
    if stream:
        told = [c.choices[0].logprobs for c in reply if c.choices and c.choices[0].logprobs]
        content, kinds = [t for part in told for t in part.content], {part.kind for part in told}
    else:
        content, kinds = reply.choices[0].logprobs.content, {reply.choices[0].logprobs.kind}
    assert kinds == {kind}
    alone = model.generate(HELLO, mode=mode, max_new_tokens=9, logprobs=2)
    expected = [t for t in alone.logprobs if t.token not in model.config.eos_token_ids]
    assert [t.logprob for t in content] == pytest.approx([t.logprob for t in expected], abs=1e-4)
    assert all(len(t.top_logprobs) == 2 for t in content)
    assert bytes(b for t in content for b in t.bytes).decode("utf-8", "replace") == alone.text


def test_completions_take_texts_ids_and_many_of_them(client, model):
    texts = ["Once upon a time", "def f(x):"]
    ids = [model.tokenizer.encode(text) for text in texts]
    expected = [model.generate(i, max_new_tokens=6, mode="ar").text for i in ids]
    for prompt in (texts, ids):
        reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=6, extra_body={"mode": "ar"})
        assert [c.text for c in reply.choices] == expected
    one = client.completions.create(model="tiny", prompt=ids[0], max_tokens=6, echo=True, extra_body={"mode": "ar"})
    assert one.choices[0].text == texts[0] + expected[0]
    told = client.completions.create(model="tiny", prompt=texts[0], max_tokens=6, logprobs=1, extra_body={"mode": "ar"})
    logprobs = told.choices[0].logprobs
    assert "".join(logprobs.tokens) == told.choices[0].text
    assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
    assert len(logprobs.token_logprobs) == len(logprobs.tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_suffix_asks_for_the_text_between(client, model, stream):
    reply = client.completions.create(
        model="tiny", prompt="The capital of", suffix=" is Paris.", max_tokens=4, stream=stream
    )
    text = "".join(c.choices[0].text for c in reply) if stream else reply.choices[0].text
    alone = model.infill(["The capital of", " is Paris."], span_length=4)
    assert text == alone.spans[0]
    if not stream:
        assert reply.usage.mode == "diffusion"
        assert reply.usage.completion_tokens == 4


def test_the_canvas_arrives_apart_from_the_text(client, model):
    asked = {"model": "tiny", "messages": HELLO, "max_tokens": 14, "stream": True}
    stream = client.chat.completions.create(**asked, extra_body={"mode": "diffusion", "stream_canvas": True})
    chunks = list(stream)
    canvases = [c.canvas["tokens"] for c in chunks if hasattr(c, "canvas")]
    assert canvases
    assert any(None in canvas for canvas in canvases)
    assert all(not c.choices[0].delta.content for c in chunks if hasattr(c, "canvas"))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == model.generate(HELLO, mode="diffusion", max_new_tokens=14).text
    plain = list(client.chat.completions.create(**asked, extra_body={"mode": "diffusion"}))
    assert not any(hasattr(c, "canvas") for c in plain)


def test_models_are_listed(client):
    (card,) = client.models.list().data
    assert card.id == "tiny"
    assert card.max_model_len == 2048
    assert client.models.retrieve("tiny").id == "tiny"


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "boolean"}},
    "required": ["n", "b"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_schema_holds_in_every_mode(client, mode, stream):
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        max_tokens=100,
        stream=stream,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
        extra_body={"mode": mode},
    )
    if stream:
        text = "".join(c.choices[0].delta.content or "" for c in reply)
    else:
        text = reply.choices[0].message.content
        assert reply.choices[0].finish_reason == "stop"
        assert reply.usage.mode == mode
    answer = json.loads(text)
    assert isinstance(answer["b"], bool)
    assert 0 <= answer["n"] <= 99


def test_greedy_self_speculation_under_a_grammar_is_greedy_autoregression_under_it(client):
    texts = []
    for mode in ("ar", "self_spec"):
        reply = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            max_tokens=40,
            extra_body={"mode": mode, "response_format": {"type": "regex", "regex": "([a-z]{3,9} ){4}[0-9]+\\."}},
        )
        texts.append(reply.choices[0].message.content)
    assert texts[0] == texts[1] != ""


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "population")
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "population"}}])
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_that_must_be_called_is_called_by_its_schema(client, choice, stream):
    reply = client.chat.completions.create(
        model="tiny",
        messages=HELLO,
        tools=TOOLS,
        tool_choice=choice,
        parallel_tool_calls=False,
        max_tokens=80,
        stream=stream,
    )
    if stream:
        chunks = list(reply)
        (call,) = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        assert not "".join(c.choices[0].delta.content or "" for c in chunks).strip()
        assert chunks[-1].choices[0].finish_reason == "tool_calls"
    else:
        (call,) = reply.choices[0].message.tool_calls
        assert reply.choices[0].message.content is None
        assert reply.choices[0].finish_reason == "tool_calls"
    assert (
        call.function.name == "population"
        if isinstance(choice, dict)
        else call.function.name in ("weather", "population")
    )
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")
    assert call.id.startswith("call_")


def test_results_of_tools_go_back_into_the_chat_and_auto_may_answer_in_words(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "18 degrees"},
    ]
    reply = client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS, max_tokens=10)
    assert reply.choices[0].finish_reason in ("stop", "length")
    none = client.chat.completions.create(
        model="tiny", messages=messages, tools=TOOLS, tool_choice="none", max_tokens=10
    )
    assert none.choices[0].message.tool_calls is None


def test_many_clients_of_all_modes_at_once_get_their_own_answers(client, model):
    asked = [
        {"messages": [{"role": "user", "content": f"Number {i}"}], "max_tokens": 6 + i % 5, "mode": MODES[i % 3]}
        for i in range(18)
    ]

    def ask(one):
        reply = client.chat.completions.create(
            model="tiny", messages=one["messages"], max_tokens=one["max_tokens"], extra_body={"mode": one["mode"]}
        )
        return reply.choices[0].message.content

    with ThreadPoolExecutor(18) as pool:
        texts = list(pool.map(ask, asked))
    for one, text in zip(asked, texts, strict=True):
        assert text == model.generate(one["messages"], mode=one["mode"], max_new_tokens=one["max_tokens"]).text


def test_rounds_of_several_lengths_have_no_one_block_length(model):
    answer = model.open_answer(HELLO, {"mode": "self_spec", "max_new_tokens": 4})
    for _ in model._run([answer], None):
        pass
    g = answer.generation
    call = SimpleNamespace(entries=[SimpleNamespace(generation=g)])
    assert _cost([answer.stats()], call)["block_length"] == g.traits.block_length
    traits = g.traits
    g.traits = replace(traits, drafts_adapt=True)
    assert _cost([answer.stats()], call)["block_length"] is None
    g.settings = replace(g.settings, block_length=3)
    assert _cost([answer.stats()], call)["block_length"] == 3
    g.choices = {"ar": 2, "linear 3": 1}
    cost = _cost([answer.stats()], call)
    assert (cost["block_length"], cost["choices"]) == (None, {"ar": 2, "linear 3": 1})
