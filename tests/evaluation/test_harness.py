"""lm-evaluation-harness runs its tasks through our model, by mode, offline."""

import json
import math
import subprocess
import sys

import pytest

import trimode
from tests.evaluation.speaking import speaking_model
from trimode.evaluation.likelihood import autoregressive_score, diffusion_score

lm_eval = pytest.importorskip("lm_eval", reason="pip install 'trimode[eval]'")

pytestmark = [
    # the harness and its libraries warn of their own
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
"""
GENERATE = """
task: tiny_generate
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["q"]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - metric: word_perplexity
"""
DOCS = [
    {"question": "what is a cat?", "choices": [" an animal", " a stone"], "label": 0, "answer": "x"},
    {"question": "two and two?", "choices": [" four", " five", " six"], "label": 0, "answer": "y"},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "docs.jsonl"
    data.write_text("\n".join(map(json.dumps, DOCS)))
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(data=data))
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def model(monkeypatch):
    model = speaking_model(3)
    monkeypatch.setitem(vars(trimode), "load", lambda name, **_: model)
    return model


def evaluated(tasks, name, arguments):
    from lm_eval.tasks import TaskManager

    import trimode.evaluation.harness  # noqa: F401  registers the model, as its command does

    return lm_eval.simple_evaluate(
        model="trimode",
        model_args=f"pretrained=tiny,{arguments}",
        tasks=[name],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


@pytest.mark.parametrize("mode", ["ar", "self_spec", "diffusion"])
def test_multiple_choice_is_decided_by_the_likelihood_of_the_mode(tasks, offline, model, mode):
    result = evaluated(tasks, "tiny_choice", f"mode={mode}")
    expected = []
    for doc in DOCS:
        ids = model.tokenizer.encode(doc["question"])
        totals = []
        for choice in doc["choices"]:
            target = model.tokenizer.encode(choice)
            score = diffusion_score if mode == "diffusion" else autoregressive_score
            totals.append(score(model, ids, target).total)
        expected.append(totals)
    samples = sorted(result["samples"]["tiny_choice"], key=lambda s: s["doc_id"])
    for sample, totals in zip(samples, expected, strict=True):
        assert [resp[0][0] for resp in sample["resps"]] == pytest.approx(totals, abs=1e-4)
    right = [totals.index(max(totals)) == doc["label"] for totals, doc in zip(expected, DOCS, strict=True)]
    assert result["results"]["tiny_choice"]["acc,none"] == sum(right) / len(right)


@pytest.mark.parametrize(
    "arguments", ["mode=ar", "mode=self_spec,block_length=4", "mode=diffusion,batch_size=2,threshold=0.5"]
)
def test_generation_is_the_models_own_up_to_the_stop_string(tasks, offline, model, arguments):
    result = evaluated(tasks, "tiny_generate", arguments)
    knobs = dict(pair.split("=") for pair in arguments.split(","))
    knobs.pop("batch_size", None)
    knobs = {k: v if k == "mode" else float(v) if "." in v else int(v) for k, v in knobs.items()}
    for sample in result["samples"]["tiny_generate"]:
        out = model.generate(DOCS[sample["doc_id"]]["question"], raw=True, max_new_tokens=12, stop=["q"], **knobs)
        assert sample["resps"][0][0] == out.text


def test_rolling_likelihood_covers_texts_longer_than_the_context(tasks, offline, model):
    result = evaluated(tasks, "tiny_rolling", "mode=ar")
    total = sum(model.score([1, *model.tokenizer.encode(doc["question"])]) for doc in DOCS)
    words = sum(len(doc["question"].split()) for doc in DOCS)
    assert result["results"]["tiny_rolling"]["word_perplexity,none"] == pytest.approx(
        math.exp(-total / words), rel=1e-4
    )
    from lm_eval.api.instance import Instance

    from trimode.evaluation.harness import TrimodeLM

    short = TrimodeLM("tiny", mode="diffusion", block_length=2)
    long = Instance("loglikelihood_rolling", {}, ("abc " * 200,), 0)
    assert short.loglikelihood_rolling([long], disable_tqdm=True)[0] < -500
    assert short.max_length == 512


def test_wrong_arguments_are_told_before_anything_runs(model):
    from trimode.errors import SettingError
    from trimode.evaluation.harness import TrimodeLM

    with pytest.raises(SettingError, match="mode must be one of"):
        TrimodeLM("tiny", mode="fast")
    assert TrimodeLM("tiny", device="cuda:0").mode == "ar"
    with pytest.raises(SettingError, match="Did you mean 'threshold'"):
        TrimodeLM("tiny", mode="diffusion", treshold=0.5)
    model.tokenizer = None
    with pytest.raises(SettingError, match="no tokenizer"):
        TrimodeLM("tiny")


def test_our_package_declares_the_entry_point():
    from importlib.metadata import entry_points

    (found,) = [e for e in entry_points(group="lm_eval.models") if e.name == "trimode"]
    assert found.load().__name__ == "TrimodeLM"


@pytest.mark.slow
def test_the_command_runs_a_local_task_on_the_embedded_model(tasks, tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "trimode.evaluation.harness", "--model", "trimode"]
    command += ["--model_args", "pretrained=smollm2-135m,mode=diffusion", "--tasks", "tiny_choice"]
    command += ["--include_path", str(tasks), "--output_path", str(tmp_path)]
    import os

    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "tiny_choice" in done.stdout
