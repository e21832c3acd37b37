"""Prompts from a command line and from files, and what is refused."""

import json
from pathlib import Path

import pytest

from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image.job import prompts_of, reward_of
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList, prompt_list, read_prompts
from rtb_rl.tasks.text_to_image.settings import TextToImageSettings


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_one_text_and_several():
    assert prompt_list("a red cat") == prompt_list(["a red cat"])
    found = prompt_list(("a cat", "two dogs"))
    assert len(found) == 2 and found.texts == ("a cat", "two dogs") and found.metadata == ({}, {})
    assert found.facts == {"prompts": ["a cat", "two dogs"]}


@pytest.mark.parametrize(
    "content",
    [
        "a cat\n\n  two dogs \r\n\t\n",
        b"\xef\xbb\xbfa cat\r\ntwo dogs\r\n",  # with the mark that some editors put in front
    ],
)
def test_a_text_file_has_a_prompt_a_line(content, tmp_path):
    assert read_prompts(written(tmp_path, "p.txt", content)) == prompt_list(["a cat", "two dogs"])


def test_a_jsonl_file_has_metadata_too(tmp_path):
    rows = [{"prompt": "a cat", "target": 3, "words": ["x"]}, {"prompt": "naïve"}]
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    found = read_prompts(written(tmp_path, "p.jsonl", "\ufeff" + lines))
    assert found.texts == ("a cat", "naïve")
    assert found.metadata == ({"target": 3, "words": ["x"]}, {})
    assert found.facts == {"prompts": list(found.texts), "metadata": list(found.metadata)}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.txt", "", "holds no prompt; write one a line"),
        ("p.txt", " \n\n", "holds no prompt"),
        ("p.jsonl", "\n", "holds no prompt"),
        ("p.txt", b"\xff\xfe\x00", "can't be read from .*a text file with one prompt a line"),
        ("p.jsonl", '{"prompt": "a"}\nb', 'line 2 of .* is no JSON object with a text under "prom'),
        ("p.jsonl", '\n\n{"text": "a"}', "line 3 of"),
        ("p.jsonl", '{"prompt": 3}', "line 1 of"),
        ("p.jsonl", '["a"]', 'write for example {"prompt"'),
    ],
)
def test_files_that_hold_none(name, content, words, tmp_path):
    with pytest.raises(InputError, match=words):
        read_prompts(written(tmp_path, name, content))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="prompts can't be read from"):
            read_prompts(path)


def test_no_prompt_and_metadata_of_another_number():
    with pytest.raises(InputError, match="there is no prompt; give at least one"):
        prompt_list([])
    with pytest.raises(InputError, match="2 prompts came with metadata for 1"):
        PromptList(("a", "b"), ({},))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "a cat\ntwo dogs\na cat \n"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "two dogs"}\n{"prompt": "a cat", "n": 2}'),
    ],
)
def test_a_prompt_that_comes_twice(name, content, tmp_path):
    """Also with other metadata: rows of results would fall on each other."""
    words = "'a cat' is there 2 times.*give each once, or word them differently"
    with pytest.raises(InputError, match=words):
        read_prompts(written(tmp_path, name, content))
    with pytest.raises(InputError, match="'x' is there 3 times"):
        prompts_of(TextToImageSettings(prompts=("x", "a", "x", "x")))


def test_what_settings_mean(tmp_path):
    """Shapes have a prompt and a reward of their own, other pipelines need both."""
    assert prompts_of(TextToImageSettings()).texts == ("a shape",)
    assert reward_of(TextToImageSettings()) == "cell:yellow triangle"
    path = written(tmp_path, "p.txt", "a cat")
    assert prompts_of(TextToImageSettings(prompt_file=path)).texts == ("a cat",)
    given = TextToImageSettings(prior="sd", prompts=("a dog",), reward="compressible")
    assert prompts_of(given).texts == ("a dog",) and reward_of(given) == "compressible"
    for settings, words in (
        (TextToImageSettings(prior="sd"), "no prompt is given for 'sd'; give --prompts or --prom"),
        (TextToImageSettings(prompts=("a",), prompt_file=path), "both prompts and a prompt file"),
    ):
        with pytest.raises(InputError, match=words):
            prompts_of(settings)
    for settings, words in (
        (TextToImageSettings(prior="sd"), "no reward is given for 'sd'; give --reward"),
        (TextToImageSettings(prior="sd", reward="cell:red circle"), "is of shapes alone"),
    ):
        with pytest.raises(InputError, match=words):
            reward_of(settings)
