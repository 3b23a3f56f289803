"""`trimode chat`, driven through standard input as a pipe drives it."""

import json

import pytest

TEXT = "The sky scatters blue light.\nThat is all."


@pytest.fixture
def talk(cli, type_in):
    def say(*lines, options=()):
        type_in(*lines)
        return cli("chat", *options)

    return say


def test_the_history_grows_by_question_and_answer(talk, model):
    ended = talk("one", "", "two")
    assert (ended.status, ended.stdout) == (0, f"{TEXT}\n{TEXT}\n")
    assert [prompt for prompt, _, _ in model.asked] == [
        [{"role": "user", "content": "one"}],
        [
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": TEXT},
            {"role": "user", "content": "two"},
        ],
    ]


def test_every_answer_is_followed_by_its_statistics(talk, model):
    assert talk("one").stderr.startswith("ar · 10 tokens")
    assert talk("one", options=["--no-stats"]).stderr == ""
    assert talk("/stats off", "one").stderr == "statistics off\n"


def test_mode_changes_for_the_next_answer_and_tells_its_notice(talk, model):
    ended = talk("/mode self-spec", "one", "/mode", "/mode ar", "two")
    assert [knobs for _, _, knobs in model.asked] == [{"mode": "self_spec"}, {"mode": "ar"}]
    assert ended.stderr.count("drafts are poor") == 1
    assert ended.stderr.count("mode self_spec\n") == 2


def test_a_mistaken_mode_or_knob_is_one_line_and_the_chat_goes_on(talk, model):
    ended = talk("/mode difusion", "/set tresh 1", "/set seed x", "/set ignore_eos perhaps", "/stats maybe", "hello")
    assert ended.stderr.splitlines()[:5] == [
        "trimode: mode must be one of auto, ar, diffusion, self_spec; got 'difusion'. Did you mean 'diffusion'?",
        "trimode: Unknown knob 'tresh'. Did you mean 'threshold'?",
        "trimode: seed must be a whole number; got 'x'.",
        "trimode: ignore_eos is on or off; got 'perhaps'.",
        "trimode: /stats is on or off; got 'maybe'.",
    ]
    assert (ended.status, ended.stdout) == (0, TEXT + "\n")
    assert model.asked[0][2] == {}


def test_knobs_are_set_shown_and_taken_back(talk, model):
    ended = talk("/set", "/set max-new-tokens 2", "/set ignore_eos on", r"/set stop \n", "/set", "/set seed", "hello")
    assert model.asked[0][2] == {"max_new_tokens": 2, "ignore_eos": True, "stop": ["\n"]}
    assert "max_new_tokens 2, ignore_eos True, stop" in ended.stderr
    assert "seed default: Same seed, same answer." in ended.stderr
    talk("/set seed 3", "/set seed default", "hello")
    assert model.asked[1][2] == {}


def test_knobs_that_need_one_another_can_be_set_in_any_order(talk, model):
    ended = talk("/set top_p 0.9", "/set temperature 0.7", "/set max_post_steps 2", "/set entropy_bound 0.2")
    assert ended.stderr.splitlines() == ["top_p 0.9", "temperature 0.7", "max_post_steps 2", "entropy_bound 0.2"]


def test_a_knob_without_effect_is_refused_and_the_message_is_not_kept(talk, model):
    ended = talk("/mode ar", "/set threshold 0.5", "one", "/set threshold default", "two")
    line = "trimode: threshold has no effect in mode ar. Leave it out. (/set KNOB default takes a setting back.)"
    assert line in ended.stderr.splitlines()
    assert model.asked[1][0] == [{"role": "user", "content": "two"}]


def test_an_unknown_command_suggests_the_nearest(talk, model):
    lines = talk("/mod ar", "/quitt", "/clear all").stderr.splitlines()
    assert lines == [
        "trimode: Unknown command /mod. Did you mean '/mode'? /help lists them all.",
        "trimode: Unknown command /quitt. Did you mean '/quit'? /help lists them all.",
        "trimode: /clear stands alone; got 'all' after it.",
    ]


def test_help_lists_every_command(talk, model):
    from trimode.cli.chat import COMMANDS

    told = talk("/help").stderr
    assert [line.split()[0] for line in told.splitlines()] == list(COMMANDS)


def test_clear_and_system_start_a_new_conversation(talk, model):
    talk("one", "/clear", "two", "/system Be brief.", "three", "four")
    prompts = [prompt for prompt, _, _ in model.asked]
    assert prompts[1] == [{"role": "user", "content": "two"}]
    assert prompts[2] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "three"}]
    assert len(prompts[3]) == 4


def test_stats_tells_what_the_conversation_cost(talk, model):
    ended = talk("/stats", "one", "two", "/stats", options=["--no-stats"])
    assert ended.stderr == "no answers yet\n2 answers · 20 tokens · 1.00 s · 20.0 tokens/s · 10 forwards\n"


def test_a_full_context_is_one_line_that_suggests_clear(talk, model):
    ended = talk("1", "2", "3", "4", "/clear", "5", options=["--no-stats"])
    assert ended.stderr.splitlines()[0] == (
        "trimode: 99 tokens do not fit the context of 64. /clear starts a new conversation."
    )
    assert model.asked[-1][0] == [{"role": "user", "content": "5"}]


def test_ctrl_c_stops_the_answer_and_keeps_its_part_in_the_history(talk, use_model):
    model = use_model(interrupt_after=2)
    ended = talk("one", "two")
    assert (ended.status, ended.stdout) == (0, "The sky\nThe sky\n")
    assert model.asked[1][0][1] == {"role": "assistant", "content": "The sky"}


def test_an_answer_stopped_before_its_first_word_leaves_no_trace_in_the_history(talk, use_model):
    model = use_model(interrupt_after=0)
    talk("one", "two")
    assert model.asked[1][0] == [{"role": "user", "content": "two"}]


def test_quit_and_the_end_of_input_exit_with_0_and_ctrl_c_at_the_prompt_with_130(talk, model, monkeypatch):
    assert talk("/quit", "never asked").status == 0
    assert talk().status == 0
    assert model.asked == []

    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert talk().status == 130


def test_json_prints_one_object_a_line(talk, model):
    ended = talk("one", "/mode ar", "two", options=["--json"])
    records = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [record["text"] for record in records] == [TEXT, TEXT]
    assert ended.stderr == "mode ar\n"


def test_the_canvas_needs_a_terminal(talk, model):
    assert "needs a terminal" in talk("/canvas on").stderr
    assert talk("hi", options=["--canvas"]).status == 2


def test_a_closed_standard_input_is_told(cli, no_model, type_in):
    type_in(None)
    ended = cli("chat")
    assert (ended.status, ended.stderr.count("\n")) == (2, 1)


def test_a_checkpoint_without_a_tokenizer_cannot_chat(talk, use_model):
    use_model(tokenizer=False)
    ended = talk("hello")
    assert ended.status == 2
    assert "has no tokenizer" in ended.stderr
