"""Training data from files and folders: kinds, encodings, shapes of records, and caches that notice a change."""

import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
from tiny_models import tiny_tokenizer

from illada.tiny.corpus import Example, held_out_examples
from illada.training import recipe as recipe_module
from illada.training.data import encode, pack
from illada.training.recipe import load_data
from illada.training.records import Record, data_version, locate_data, read_records
from illada.training.settings import DataArguments

TEXTS = ["first text", "second text"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    import datasets

    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))


def texts_of(source, tokenizer=None, **settings) -> list[str]:
    """What a run on `source` learns, row by row."""
    tokenizer = tokenizer or tiny_tokenizer()

    config = SimpleNamespace(vocab_size=37, mask_token_id=5)
    data = load_data(
        str(source), DataArguments(train_data=str(source), format="llada_sft", **settings), tokenizer, config
    )
    return [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in data]


def write_lines(path: Path, *texts: str):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


# Caches


@pytest.mark.parametrize("name", ["data.jsonl", "folder", "folder/deeper"])
@pytest.mark.parametrize("same_time", [False, True])
def test_data_that_changed_between_two_runs_are_read_again(tmp_path, name, same_time):
    source = tmp_path / name
    file = source if source.suffix else source / "part.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    top = tmp_path / name.split("/")[0]
    write_lines(file, "old data")
    assert texts_of(top) == ["old data"]
    before = file.stat()
    write_lines(file, "newer data")
    if same_time:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts_of(top) == ["newer data"]


def test_a_file_more_in_a_folder_is_read(tmp_path):
    write_lines(tmp_path / "data" / "a.jsonl", "one")
    assert texts_of(tmp_path / "data") == ["one"]
    write_lines(tmp_path / "data" / "b.jsonl", "two")
    assert sorted(texts_of(tmp_path / "data")) == ["one", "two"]


def test_the_version_of_a_repository_is_its_commit(monkeypatch):
    from illada.training import records

    class Hub:
        def dataset_info(self, repo_id):
            return SimpleNamespace(sha=commits[repo_id])

    commits = {"someone/texts": "a" * 40}
    monkeypatch.setattr(records, "HfApi", Hub)
    first = data_version("someone/texts")
    assert first == data_version("someone/texts")
    commits["someone/texts"] = "b" * 40
    assert data_version("someone/texts") != first


def test_settings_tokenizer_and_code_name_the_cache_too(tmp_path, monkeypatch):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}.{% endfor %}"
    assert texts_of(path, tokenizer) == ["hi.hello"]
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    assert texts_of(path, tokenizer) == ["hi hello"]
    getsource = recipe_module.inspect.getsource
    monkeypatch.setattr(recipe_module.inspect, "getsource", lambda module: getsource(module) + "# changed")
    monkeypatch.setattr(recipe_module, "one_per_row", lambda encoded: iter([{"input_ids": [6]}]))
    assert texts_of(path, tokenizer) == ["a"]


# Files


def write_file(path: Path, rows: list[dict]):
    if path.suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_kind_of_file_is_read(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    write_file(path, [{"text": text} for text in TEXTS])
    assert [record.text for record in read_records(str(path))] == TEXTS
    write_file(path, [{"text": ""}])
    with pytest.raises(ValueError, match=rf"data\{suffix}, (line|record|row) 1: `text` must be a string that is not"):
        list(read_records(str(path)))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_chats_are_read_from_tables_too(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    write_file(path, [{"messages": CHAT}])
    assert [(record.prompt, record.text) for record in read_records(str(path))] == [(CHAT[:1], "hello")]


def test_json_may_have_a_record_in_each_line(tmp_path):
    write_lines(tmp_path / "data.json", *TEXTS)
    assert [record.text for record in read_records(str(tmp_path / "data.json"))] == TEXTS


def test_numbers_and_words_of_a_csv_are_text(tmp_path):
    (tmp_path / "data.csv").write_text("text\n12\nNA\n")
    assert [record.text for record in read_records(str(tmp_path / "data.csv"))] == ["12", "NA"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv"])
def test_a_byte_order_mark_is_no_text_and_latin_1_is_named(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    content = "text\ncaf\u00e9\n" if suffix == ".csv" else '{"text": "caf\u00e9"}\n'
    path.write_bytes(content.encode("utf-8-sig"))
    assert [record.text for record in read_records(str(path))] == ["caf\u00e9"]
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"data\{suffix}.*UTF-8"):
        list(read_records(str(path)))


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
def test_a_damaged_file_is_named(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"
    path.write_text("[{'text': ")
    with pytest.raises(ValueError, match=rf"data\{suffix}.*: not "):
        list(read_records(str(path)))


@pytest.mark.parametrize("source", ["data.txt", "data.xlsx", "no such id!", "absent.csv", "absent.jsonl"])
def test_what_is_no_source_is_named_with_what_is_allowed(tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    for name in ("data.txt", "data.xlsx"):
        Path(name).write_text("text")
    with pytest.raises(ValueError, match=rf"`train_data` must be a .jsonl, .json, .parquet, .csv file.*{source}"):
        locate_data(source, "train_data")


def test_a_folder_without_data_is_named(tmp_path):
    with pytest.raises(ValueError, match="no data set with a `train` split"):
        list(read_records(str(tmp_path)))


# Shapes of records


SHAPES = {
    "messages": ({"messages": CHAT}, CHAT[:1], "hello"),
    "plain completion": ({"prompt": "one ", "completion": "two"}, "one ", "two"),
    "completion of messages": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, CHAT[:1], "hello"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        CHAT[:1],
        "hello",
    ),
    "Alpaca": ({"instruction": "hi", "input": "", "output": "hello"}, CHAT[:1], "hello"),
    "Alpaca with an input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        [{"role": "user", "content": "Add.\n\n1, 2"}],
        "3",
    ),
    "document": ({"text": "one"}, "", "one"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_common_shapes_are_understood(tmp_path, shape):
    record, prompt, text = SHAPES[shape]
    write_file(tmp_path / "data.jsonl", [record])
    [read] = read_records(str(tmp_path / "data.jsonl"))
    assert (read.prompt, read.text) == (prompt, text)


def test_the_prompt_of_a_plain_completion_is_not_templated():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    record = Record("ab", "cd", "data.jsonl, line 1", "prompt + completion")
    [(ids, prompt_length)] = encode(tokenizer, [record])
    assert tokenizer.decode(ids[:prompt_length]) == "<s>ab" and tokenizer.decode(ids[prompt_length:]) == "cd</s>"
    [(ids, prompt_length)] = encode(tokenizer, [Example("ordering", "ab", "cd", ())])
    assert "ab" in tokenizer.decode(ids[:prompt_length]) and tokenizer.decode(ids[:2]) != "<s>ab"


BAD_RECORDS = {
    "a preference": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "`messages` or `prompt` and `completion` or"),
    "a speaker": (
        {"conversations": [{"from": "bot", "value": "a"}]},
        r"`conversations\[0\].from` must be one of human",
    ),
    "no output": ({"instruction": "a", "output": ""}, "`output` must be a string that is not empty"),
    "two answers": ({"prompt": CHAT[:1], "completion": CHAT[1:] * 2}, "`completion` must be one message, got 2"),
    "half a pair": ({"text": "a\ud83d"}, "half of a surrogate pair"),
    "a part of a message": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT[1]]},
        r"`messages\[0\].content` must be a string",
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_of_another_shape_is_named(tmp_path, case):
    record, message = BAD_RECORDS[case]
    write_file(tmp_path / "data.jsonl", [{"text": "right"}, record])
    with pytest.raises(ValueError, match=f"data.jsonl, line 2: .*{message}"):
        list(read_records(str(tmp_path / "data.jsonl")))


# Work and ends


class CountingList(list):
    """Counts the items that slices copy."""

    copied = 0

    def __getitem__(self, index):
        result = super().__getitem__(index)
        if isinstance(index, slice):
            CountingList.copied += len(result)
            return CountingList(result)
        return result


def test_packing_copies_every_token_once():
    CountingList.copied = 0
    ids = CountingList(range(50_000))
    rows = list(pack([(ids, 1)], 8, isolated=True))
    assert len(rows) == 6_250 and CountingList.copied <= 50_000


def test_held_out_examples_end_with_the_split():
    names = 12 * 11 * 10 * 9 * 2  # lines of four of twelve names, from either end
    everything = 747
    examples = held_out_examples("ordering", everything)
    assert len(set(examples)) == everything < names / 30
    with pytest.raises(ValueError, match=f"`count` must be at most {everything} for 'ordering', easy, test, got 748"):
        held_out_examples("ordering", everything + 1)


@pytest.mark.parametrize(("name", "value"), [("family", "maze"), ("split", "train"), ("difficulty", "extreme")])
def test_names_of_held_out_examples_are_checked(name, value):
    with pytest.raises(ValueError, match=f"`{name}` must be one of .*, got '{value}'"):
        held_out_examples(**{"family": "grid", "count": 1, name: value})


def test_a_stream_has_the_shapes_too(tmp_path):
    write_file(tmp_path / "data.json", [{"prompt": "ab", "completion": "cd"}] * 3)
    assert list(itertools.islice(texts_of(tmp_path / "data.json", streaming=True), 3)) == ["abcd"] * 3
