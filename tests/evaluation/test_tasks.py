"""Answers are graded exactly, whatever stands around them; files of examples are refused with their line."""

import gzip
import json
from decimal import Decimal

import pytest

from trimode.errors import DataError, SettingError
from trimode.evaluation.tasks import Example, open_tasks
from trimode.evaluation.tasks.extraction import first_object
from trimode.evaluation.tasks.gsm8k import read_number
from trimode.evaluation.tasks.humaneval import humaneval, program_of

PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n    assert candidate(0) == 0\n",
}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 3 * 4 = 12\n#### 12", "12"),
        ("The answer is $1,234.50.", "1234.5"),
        ("First 5, then 7. The answer is 35 dollars, for 2 people.", "35"),
        ("The answer is 1. No: the answer is 2.", "2"),
        ("She has 8 apples and 9 pears left.", "9"),
        ("it is \\boxed{-17}", "-17"),
        ("Answer: 0.5", "0.5"),
        ("twelve", None),
        ("", None),
        ("10,5", "5"),
    ],
)
def test_the_number_that_a_text_ends_up_at(text, number):
    assert read_number(text) == (None if number is None else Decimal(number))


def test_gsm8k_is_graded_by_number(tmp_path):
    file = tmp_path / "g.jsonl.gz"
    lines = [{"question": "q?", "answer": "2+2=4\n#### 4"}, {"id": "x", "prompt": "r?", "reference": "1,000"}]
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, lines)).encode()))
    (task,) = open_tasks([f"gsm8k={file}"], limit=None, seed=0)
    four, thousand = task.examples
    assert thousand.id == "x"
    assert task.grade(four, "The answer is 4.").score == 1
    assert task.grade(four, "The answer is 4.0").score == 1
    assert task.grade(four, "The answer is 5.").score == 0
    assert task.grade(four, "I do not know").note == "no number"
    assert task.grade(thousand, "1000").score == 1


def write(tmp_path, *records):
    file = tmp_path / "h.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in records))
    return file


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Here it is:\n```python\ndef double(x: int) -> int:\n    return 2 * x\n```\nDone.", 1),
        ("```\n    return x + x\n```", 1),
        ("    return x + x\n", 1),
        ("def double(x):\n    return List and 2 * x\n", 1),
        ("```python\ndef double(x):\n    return x\n```", 0),
        ("def double(x):\n    while True: pass\n", 0),
        ("```python\ndef double(x):\n    import os; os._exit(0)\n```", 0),
        ("I cannot.", 0),
        ("", 0),
    ],
)
def test_humaneval_runs_the_tests_on_what_the_answer_defines(tmp_path, answer, score):
    from trimode.evaluation.sandbox import Limits

    task = humaneval(
        write(tmp_path, PROBLEM), limit=None, limits=Limits(wall_s=3 if "while" in answer else 30, cpu_s=30)
    )
    assert task.grade(task.examples[0], answer).score == score


def test_a_program_keeps_the_imports_of_its_prompt_and_not_its_stub():
    example = Example(id="0", prompt="", reference=PROBLEM)
    program = program_of(example, "```python\ndef double(x):\n    return 2 * x\n```")
    assert program.count("def double") == 1
    assert program.startswith("from typing import List")
    assert program.rstrip().endswith("check(double)")


@pytest.mark.parametrize("name", ["json", "copy", "count"])
def test_made_examples_are_the_same_for_a_seed_and_right_answers_score_one(name):
    first, again, other = (open_tasks([name], limit=6, seed=s)[0] for s in (0, 0, 1))
    assert first.examples == again.examples
    assert first.examples != other.examples
    for example in first.examples:
        # the shots show right answers of the same kind
        for asked, answer in example.shots:
            assert asked != example.prompt
            assert "\n" not in answer
        joined = " " if name == "copy" else ", "
        right = json.dumps(example.reference["facts"]) if name == "json" else joined.join(example.reference)
        assert first.grade(example, right).score == 1
        assert first.grade(example, f"Sure:\n{right}\n").score == 1
        wrong = first.grade(example, right[:-6])
        assert wrong.score == 0
        assert first.grade(example, "").score == 0
        if name != "json":
            assert 0 < wrong.parts["prefix"] < 1


def test_extraction_tells_validity_from_fields():
    (task,) = open_tasks(["json"], limit=2, seed=0)
    person, facts = task.examples[0], task.examples[0].reference["facts"]
    wrong_value = json.dumps({**facts, "age": facts["age"] + 1})
    grade = task.grade(person, wrong_value)
    assert (grade.score, grade.parts) == (0, {"valid": 1, "fields": 0.8})
    wrong_type = json.dumps({**facts, "age": str(facts["age"])})
    assert task.grade(person, wrong_type).parts == {"valid": 0, "fields": 0.8}
    assert task.grade(person, json.dumps({**facts, "age": True})).parts["valid"] == 0
    assert "not in the schema" in task.grade(person, json.dumps({**facts, "more": 1})).note
    assert task.grade(person, json.dumps(facts)[:-1]).note == "no JSON object"


def test_the_first_object_is_found_among_other_braces():
    assert first_object('use {x} so: {"a": {"b": 1}} and {"c": 2}') == {"a": {"b": 1}}
    assert first_object("{" * 5000) is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no examples"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: '[]' is not an object"),
        ('{"question": "q"}', "line 1: there is no 'answer'"),
        ('{"question": "q", "answer": "#### 1"}\n\n{"prompt": "x"}', "line 3: there is no 'reference'"),
        ('{"question": "q", "answer": "none"}', "line 1: the answer holds no number"),
        ('{"question": "", "answer": "1"}', "line 1: the question must be a text"),
    ],
)
def test_faulty_files_are_told_with_their_line(tmp_path, text, told):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=told.replace("[", r"\[")):
        open_tasks([f"gsm8k={file}"], limit=None, seed=0)


def test_faulty_humaneval_files_are_told_with_their_line(tmp_path):
    with pytest.raises(DataError, match="line 2: entry_point must be the name"):
        humaneval(write(tmp_path, PROBLEM, {**PROBLEM, "entry_point": "a b"}), limit=None)
    with pytest.raises(DataError, match="line 1: there is no 'test'"):
        humaneval(write(tmp_path, {"prompt": "p", "entry_point": "f"}), limit=None)
    assert len(humaneval(write(tmp_path, PROBLEM, {"bad": 1}), limit=1).examples) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["gsm8k"], "needs its file"),
        (["gsmk"], "Did you mean 'gsm8k'"),
        (["copy=x"], "makes its own"),
        (["copy", "copy"], "twice"),
        ([], "No task"),
    ],
)
def test_mistyped_tasks_are_told(words, told):
    with pytest.raises(SettingError, match=told):
        open_tasks(words, limit=1, seed=0)


def test_a_missing_file_is_told():
    with pytest.raises(DataError, match="There is no file nowhere"):
        open_tasks(["gsm8k=nowhere.jsonl"], limit=1, seed=0)
