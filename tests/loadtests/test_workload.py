import json
from pathlib import Path

import pytest

from loadtests.errors import WorkloadError
from loadtests.workload import Workload, preset, read_texts


def test_prompts_have_the_exact_length_and_stay_in_range() -> None:
    workload = Workload(prompt_tokens=37, token_range=(5, 9))
    for index in range(20):
        prompt = workload.prompt(index)
        assert len(prompt) == 37
        assert set(prompt) <= {5, 6, 7, 8}


def test_prompts_follow_from_the_seed_and_differ_from_each_other() -> None:
    one, same, salted, other = (Workload(seed=1), Workload(seed=1), Workload(seed=1, salt="round 2"), Workload(seed=2))
    assert [one.prompt(i) for i in range(5)] == [same.prompt(i) for i in range(5)]
    distinct = {tuple(workload.prompt(i)) for workload in (one, salted, other) for i in range(5)}
    assert len(distinct) == 15


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    workload = Workload(prompt_tokens=20, shared_prefix_tokens=12)
    prompts = [workload.prompt(i) for i in range(5)]
    assert len({tuple(prompt[:12]) for prompt in prompts}) == 1
    assert len({tuple(prompt[12:]) for prompt in prompts}) == 5
    assert all(len(prompt) == 20 for prompt in prompts)


def test_the_body_asks_for_a_greedy_stream_of_fixed_length_with_usage() -> None:
    body = json.loads(Workload(output_tokens=7, model="m", extra_body={"top_k": 3}).body(0))
    assert len(body.pop("prompt")) == 128
    assert body == {
        "model": "m",
        "max_tokens": 7,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "top_k": 3,
    }


def test_end_of_text_may_be_respected() -> None:
    assert "ignore_eos" not in json.loads(Workload(ignore_eos=False).body(0))


def test_texts_take_turns() -> None:
    workload = Workload(texts=("one", "two"))
    assert [workload.prompt(i) for i in range(3)] == ["one", "two", "one"]
    assert workload.described()["num_texts"] == 2
    assert "one" not in json.dumps(workload.described())


def test_presets_fix_the_shape_and_nothing_else() -> None:
    prefix = preset("prefix", Workload(seed=9, model="m"))
    assert (prefix.prompt_tokens, prefix.shared_prefix_tokens, prefix.output_tokens) == (528, 512, 32)
    assert (prefix.seed, prefix.model, prefix.name) == (9, "m", "prefix")
    with pytest.raises(WorkloadError, match="long, prefix"):
        preset("short", Workload())


@pytest.mark.parametrize(
    "sizes",
    [
        {"prompt_tokens": 0},
        {"output_tokens": 0},
        {"prompt_tokens": 8, "shared_prefix_tokens": 8},
        {"token_range": (5, 5)},
        {"token_range": (-1, 5)},
    ],
)
def test_nonsense_is_refused(sizes: dict[str, object]) -> None:
    with pytest.raises(WorkloadError):
        Workload(**sizes)  # type: ignore[arg-type]


def test_texts_are_read_from_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("one\n\ntwo \n", encoding="utf-8")
    assert read_texts(path) == ("one", "two ")


def test_texts_are_read_from_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one\\nline"\n{"prompt": "two"}\n', encoding="utf-8")
    assert read_texts(path) == ("one\nline", "two")


@pytest.mark.parametrize("content", ["", '{"text": "x"}', "not json", '""'])
def test_files_without_prompts_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(WorkloadError, match=r"prompts\.jsonl"):
        read_texts(path)


def test_several_prefixes_are_drawn_for_each_request_and_shared_as_one_is() -> None:
    one = Workload(prompt_tokens=20, shared_prefix_tokens=10)
    many = Workload(prompt_tokens=20, shared_prefix_tokens=10, num_prefixes=4)
    prefixes = [tuple(many.prompt(n)[:10]) for n in range(100)]
    assert len(set(prefixes)) == 4
    assert tuple(one.prompt(0)[:10]) in prefixes
    assert [tuple(many.prompt(n)[10:]) for n in range(3)] == [tuple(one.prompt(n)[10:]) for n in range(3)]
    assert prefixes[:10] != [prefixes[n % 4] for n in range(10)], "in turn would suit a server that takes turns"
