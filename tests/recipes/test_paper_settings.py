"""recipes/sft/paper: settings for the paper's data sets, on rows of their form; the Hub is not asked."""

import json

import pytest
import yaml
from datasets import Dataset
from helpers.recipes import ROOT, run, sft_arguments

import recipes.sft.__main__ as recipe
from recipes.common.evaluate import answer
from recipes.sft.data import Form, load_data

FILES = {path.stem: path for path in sorted((ROOT / "recipes/sft/paper").glob("*.yaml"))}
PULLS = {"label": ["A", "B"], "text": ["a spoon", "a magnet"]}
BURNS = {"label": ["1", "2", "3"], "text": ["ice", "sand", "wood"]}


def gpqa(question, correct, *incorrect):
    others = {f"Incorrect Answer {i}": text for i, text in enumerate(incorrect, 1)}
    return {"Record ID": "rec", "Question": question, "Correct Answer": correct, **others, "Canary String": None}


# Two rows of each data set with the columns that it has on the Hub, each with its prompt and its completion.
ROWS = {
    "arc": [
        (
            {"id": "M1", "question": "What pulls iron?", "choices": PULLS, "answerKey": "B"},
            "What pulls iron?\nA. a spoon\nB. a magnet\nAnswer with the letter.",
            "B",
        ),
        (
            {"id": "N2", "question": "What burns?", "choices": BURNS, "answerKey": "3"},
            "What burns?\n1. ice\n2. sand\n3. wood\nAnswer with the letter.",
            "3",
        ),
    ],
    "boolq": [
        (
            {"question": "is ice cold", "answer": True, "passage": "Ice is frozen."},
            "Ice is frozen.\nis ice cold? Answer with yes or no.",
            "yes",
        ),
        (
            {"question": "is fire cold", "answer": False, "passage": "Fire burns."},
            "Fire burns.\nis fire cold? Answer with yes or no.",
            "no",
        ),
    ],
    "gpqa": [
        (gpqa("Which?", "b\n", "d", "a", "c"), "Which?\nA. a\nB. b\nC. c\nD. d\nAnswer with the letter.", "B"),
        (gpqa("What?", "z", "w", "y", "x"), "What?\nA. w\nB. x\nC. y\nD. z\nAnswer with the letter.", "D"),
    ],
    "gsm8k": [
        ({"question": "2 + 2?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}, "2 + 2?", "2 + 2 = <<2+2=4>>4\n#### 4"),
        ({"question": "3 * 5?", "answer": "It is 15.\n#### 15"}, "3 * 5?", "It is 15.\n#### 15"),
    ],
    "hellaswag": [
        (
            {"ind": 1, "ctx": "He", "endings": ["runs", "eats", "is", "sat"], "label": "3"},
            "He\nA. runs\nB. eats\nC. is\nD. sat\nWhich ending fits? Answer with the letter.",
            "D",
        ),
        (
            {"ind": 2, "ctx": "She", "endings": ["up", "in", "on", "at"], "label": "0"},
            "She\nA. up\nB. in\nC. on\nD. at\nWhich ending fits? Answer with the letter.",
            "A",
        ),
    ],
    "math": [
        (
            {"problem": "x = 1", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{1}$."},
            "x = 1",
            r"$\boxed{1}$.",
        ),
        (
            {"problem": "2x = 1", "level": "Level 2", "type": "Algebra", "solution": r"So $\boxed{\frac{1}{2}}$."},
            "2x = 1",
            r"So $\boxed{\frac{1}{2}}$.",
        ),
    ],
    "mbpp": [
        (
            {"task_id": 1, "text": "Write f.", "code": "def f():\r\n  pass", "test_list": ["assert not f()", "f()"]},
            "Write f.\nIt has to pass: assert not f()",
            "def f():\r\n  pass",
        ),
        (
            {"task_id": 2, "text": "Write g.", "code": "g = {1: 2} ", "test_list": ["assert g"]},
            "Write g.\nIt has to pass: assert g",
            "g = {1: 2}",
        ),
    ],
    "openbookqa": [
        (
            {"id": "7", "question_stem": "Iron follows", "choices": PULLS, "answerKey": "B"},
            "Iron follows\nA. a spoon\nB. a magnet\nAnswer with the letter.",
            "B",
        ),
        (
            {"id": "8", "question_stem": "Soup needs", "choices": PULLS, "answerKey": "A"},
            "Soup needs\nA. a spoon\nB. a magnet\nAnswer with the letter.",
            "A",
        ),
    ],
    "race": [
        (
            {"article": "He ran.", "answer": "A", "question": "Who?", "options": ["he", "she", "I", "we"]},
            "He ran.\nWho?\nA. he\nB. she\nC. I\nD. we\nAnswer with the letter.",
            "A",
        ),
        (
            {"article": "We sat.", "answer": "D", "question": "_ sat.", "options": ["he", "she", "I", "we"]},
            "We sat.\n_ sat.\nA. he\nB. she\nC. I\nD. we\nAnswer with the letter.",
            "D",
        ),
    ],
}


def save_as_on_the_hub(folder, settings, rows):
    """The rows in the configuration and splits that the settings name; both in one split where they name one."""
    train, test = (settings[f"dataset_{name}_split"].split("[")[0] for name in ("train", "test"))
    splits = {train: rows} if train == test else {train: rows[:1], test: rows[1:]}
    for split, some in splits.items():
        Dataset.from_list(some).to_parquet(folder / f"{split}.parquet")
    files = [{"split": split, "path": f"{split}.parquet"} for split in splits]
    names = [settings["dataset_config"], "another"] if "dataset_config" in settings else ["default"]
    configs = [{"config_name": name, "data_files": files} for name in names]  # of several, one has to be named
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")


def test_each_file_has_rows():
    assert FILES.keys() == ROWS.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_file_parses_and_forms_its_rows(name, command_line, tmp_path):
    rows, prompts, completions = zip(*ROWS[name], strict=True)
    save_as_on_the_hub(tmp_path, yaml.safe_load(FILES[name].read_text()), list(rows))
    command_line("--config", FILES[name], "--dataset_name", tmp_path, "--bf16", "false")  # there may be no GPU
    script_args, test_args, *_, training_args = recipe.parse()
    train, test = load_data(script_args, test_args)
    made = [*train, *test]
    assert [row["prompt"] for row in made] == [[{"role": "user", "content": text}] for text in prompts]
    assert [row["completion"] for row in made] == [[{"role": "assistant", "content": text}] for text in completions]
    assert len(train) == len(test) == 1 and train.column_names == ["prompt", "completion"]
    assert (
        FILES[name]
        .read_text()
        .splitlines()[0]
        .endswith(f": python -m recipes.sft --config recipes/sft/paper/{name}.yaml")
    )
    assert (training_args.num_train_epochs, training_args.learning_rate) == (25, 2e-4)


@pytest.mark.parametrize(("name", "answers"), [("gsm8k", ["4", "15"]), ("math", ["1", r"\frac{1}{2}"])])
def test_what_is_compared_is_the_final_answer(name, answers):
    pattern = yaml.safe_load(FILES[name].read_text())["answer_pattern"]
    assert [answer(completion, pattern) for _, _, completion in ROWS[name]] == answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"$\boxed{3}$, as $\sqrt{9} = 3$", "3"),
        (r"\boxed{1} or \boxed{\left(\frac{3}{2}, x^{2^{3}}\right)}.", r"\left(\frac{3}{2}, x^{2^{3}}\right)"),
        (r"$\fbox{4}$", "4"),
        (r"$\boxed 5$.", "5"),
        ("no answer", None),
    ],
)
def test_marks_of_math_answers(text, expected):
    """As the data set has them: with braces in braces, with more after them, and without any."""
    assert answer(text, yaml.safe_load(FILES["math"].read_text())["answer_pattern"]) == expected


def test_a_row_without_a_label_is_refused():
    """The Hub's test split of HellaSwag has empty labels."""
    settings = yaml.safe_load(FILES["hellaswag"].read_text())
    with pytest.raises(SystemExit, match="A row has ind, ctx, endings, label; the template is"):
        Form(settings["doc_to_text"], settings["doc_to_target"])({**ROWS["hellaswag"][0][0], "label": ""})


def test_the_files_differ_in_their_data_alone():
    own = {"output_dir", "max_new_tokens", "answer_pattern", "doc_to_text", "doc_to_target"}
    settings = [yaml.safe_load(path.read_text()) for path in FILES.values()]
    for name in set().union(*settings) - own:
        assert name.startswith("dataset_") or len({str(each[name]) for each in settings}) == 1
    shared = {"lora_r": 8, "queryable_num_atoms": 16, "queryable_top_k": 4, "queryable_routing_scope": "prompt"}
    assert shared.items() <= settings[0].items()


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
    with pytest.raises(SystemExit, match=r"A value is null. A row has question, answer; .* \{\{ answer \}\}"):
        Form("{{ question }}", "{{ answer }}")({"question": "2 + 2?", "answer": None})
    with pytest.raises(SystemExit, match="A template is no Jinja"):
        Form("{{ question }", "{{ answer }}")


@pytest.mark.parametrize("name", ["doc_to_text", "doc_to_target"])
def test_one_template_alone_is_refused(name, command_line, capsys):
    command_line(f"--{name}", "{{ question }}")
    with pytest.raises(SystemExit):
        recipe.parse()
    assert "pass both, or neither" in capsys.readouterr().err
