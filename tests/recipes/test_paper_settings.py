"""recipes/sft/paper: settings for the paper's data sets, on rows of their form; the Hub is not asked."""

import json

import pytest
import yaml
from datasets import Dataset
from helpers.recipes import ROOT, run, sft_arguments

import recipes.sft.__main__ as recipe
from recipes.sft.data import Form, load_data

FILES = {path.stem: path for path in sorted((ROOT / "recipes/sft/paper").glob("*.yaml"))}
CHOICES = {"label": ["A", "B"], "text": ["a spoon", "a magnet"]}
ROWS = {  # a row of each data set as the Hub has it, the end of its prompt, and its completion
    "arc": ({"question": "What pulls?", "choices": CHOICES, "answerKey": "B"}, "A. a spoon\nB. a magnet", "B"),
    "boolq": ({"passage": "Ice is cold.", "question": "is ice cold", "answer": True}, "is ice cold?", "yes"),
    "gpqa": (
        {
            "Question": "Which?",
            "Correct Answer": "b",
            **{f"Incorrect Answer {i}": text for i, text in enumerate("dac", 1)},
        },
        "Which?\nA. a\nB. b\nC. c\nD. d",
        "B",
    ),
    "gsm8k": ({"question": "2 + 2?", "answer": "2 + 2 = 4\n#### 4"}, "2 + 2?", "2 + 2 = 4\n#### 4"),
    "hellaswag": ({"ctx": "He", "endings": ["runs", "eats", "is", "sat"], "label": "3"}, "He\nA. runs\nB. eats", "D"),
    "math": ({"problem": "x = 1", "solution": r"So \boxed{1}."}, "x = 1", r"So \boxed{1}."),
    "mbpp": (
        {"text": "Write f.", "code": "def f():\r\n    pass", "test_list": ["assert f() is None"]},
        "Write f.\nIt has to pass: assert f() is None",
        "def f():\r\n    pass",
    ),
    "openbookqa": (
        {"question_stem": "What pulls?", "choices": CHOICES, "answerKey": "A"},
        "What pulls?\nA. a spoon\nB. a magnet",
        "A",
    ),
    "race": (
        {"article": "He ran.", "question": "Who?", "options": ["he", "she", "I", "we"], "answer": "A"},
        "He ran.\nWho?\nA. he\nB. she\nC. I\nD. we",
        "A",
    ),
}


def test_each_file_has_a_row():
    assert FILES.keys() == ROWS.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_and_forms_its_rows(name, command_line):
    command_line("--config", FILES[name], "--bf16", "false")  # there may be no GPU
    script_args, *_, training_args = recipe.parse()
    row, prompt, completion = ROWS[name]
    made = Form(script_args.doc_to_text, script_args.doc_to_target)(row)
    assert prompt in made["prompt"][0]["content"]
    assert made["completion"] == [{"role": "assistant", "content": completion}]
    assert f"--config recipes/sft/paper/{name}.yaml" in FILES[name].read_text().splitlines()[0]
    assert (training_args.num_train_epochs, training_args.learning_rate) == (25, 2e-4)


def test_the_files_differ_in_their_data_alone():
    own = {"output_dir", "max_new_tokens", "answer_pattern", "doc_to_text", "doc_to_target"}
    settings = [yaml.safe_load(path.read_text()) for path in FILES.values()]
    for name in set().union(*settings) - own:
        assert name.startswith("dataset_") or len({str(each[name]) for each in settings}) == 1


def test_data_from_files_in_the_form_of_a_data_set(command_line, model_folder, data_folder, tmp_path):
    """Through the command: raw rows become the examples that the adapter is trained and tested on."""
    rows = [{"question": f"{a} + {b}?", "answer": f"#### {a + b}"} for a in range(4) for b in range(3)]
    for part, some in {"train": rows[:10], "test": rows[10:]}.items():
        (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    arguments = sft_arguments(model_folder, tmp_path, tmp_path / "out")
    arguments += ["--max_steps", 1, "--methods", "queryable", "--answer_pattern", "#### (.*)"]
    run("recipes.sft", *arguments, "--doc_to_text", "{{ question }}", "--doc_to_target", "{{ answer }}")
    tested = [json.loads(line) for line in (tmp_path / "out/test.jsonl").read_text().splitlines()]
    assert [row["completion"][0]["content"] for row in tested] == ["#### 4", "#### 5"]
    assert [row["prompt"][0]["content"] for row in tested] == ["3 + 1?", "3 + 2?"]


def test_a_data_set_in_a_folder(command_line, tmp_path):
    for split in ("train", "test"):
        Dataset.from_list([{"question": split, "answer": "1", "more": 2}]).to_json(tmp_path / f"{split}.jsonl")
    command_line(
        "--dataset_name", tmp_path, "--doc_to_text", "{{ question }}", "--doc_to_target", "{{ row['answer'] }}"
    )
    script_args, test_args, *_ = recipe.parse()
    train, test = load_data(script_args, test_args)
    assert train.column_names == ["prompt", "completion"] and test[0]["prompt"][0]["content"] == "test"


def test_templates_that_do_not_fit():
    with pytest.raises(SystemExit, match=r"'answr' is undefined. A row has question, answer; .* \{\{ answr \}\}"):
        Form("{{ question }}", "{{ answr }}")({"question": "2 + 2?", "answer": "4"})
    with pytest.raises(SystemExit, match="The completion of a row is empty"):
        Form("{{ question }}", "{{ answer }}")({"question": "2 + 2?", "answer": " "})
    with pytest.raises(SystemExit, match="A template is no Jinja"):
        Form("{{ question }", "{{ answer }}")


def test_one_template_alone_is_refused(command_line, capsys):
    command_line("--doc_to_text", "{{ question }}")
    with pytest.raises(SystemExit):
        recipe.parse()
    assert "pass both, or neither" in capsys.readouterr().err
