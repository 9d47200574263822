# SPDX-License-Identifier: Apache-2.0


import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fastapi.responses import JSONResponse
from trl import TrlParser

from alphagrpo_ext.shapes.prompts import prompt_rows
from reward_models.decomposition.record_file import RecordFile
from reward_models.prompts.loading import load_prompts
from reward_models.prompts.questions import from_row, load_records
from support.chat_stub import ChatRequest, chat_stub, good_answer
from support.recipe_modules import load_recipe


ROOT = Path(__file__).parents[2]
DEADLINE = 1800


# A progress bar that is drawn often would fill the pipe, which is only read when a process has ended.
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "TQDM_MININTERVAL": "10"}


def start(*arguments: str | Path, **options: Any) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, ROOT / "recipes" / "decompose_prompts.py", *map(str, arguments)],
        env=os.environ | ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        **options,
    )


def run(*arguments: str | Path, code: int = 0, **options: Any) -> str:
    """Run the recipe to its end, check its exit code and return what it printed."""
    process = start(*arguments, **options)
    try:
        output, errors = process.communicate(timeout=DEADLINE)
    finally:
        process.kill()
    assert process.returncode == code, errors
    return output + errors


def write_prompts(path: Path, prompts: list[str]) -> Path:
    path.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    return path


def prompts_in(path: Path) -> list[str]:
    return [record.prompt for record in load_records(path)]


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + DEADLINE
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        # Not too often: the server shares this process.
        time.sleep(0.1)


def failing_on(word: str):
    """The answers of the stub, but for prompts with a certain word."""
    return lambda request: "I cannot do that." if word in request.prompt.split() else good_answer(request)


def test_without_arguments_it_demonstrates_itself(tmp_path: Path) -> None:
    assert "100 records added" in run(cwd=tmp_path)
    output = tmp_path / "runs" / "decompose_prompts" / "questions.jsonl"
    assert load_records(output) == [from_row(row) for row in prompt_rows("train", 100, seed=0)]
    assert len(load_prompts(str(output.parent), "train", 1)) == 100
    before = output.read_bytes()
    assert "0 records added" in run(cwd=tmp_path)
    assert output.read_bytes() == before


def test_prompts_from_a_file_are_decomposed_once_each(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", ["two cats", "ein Käfer 🐈", "", "two cats", "a dog"])
    output = tmp_path / "questions.jsonl"
    with chat_stub() as stub:
        run("--input", prompts, "--output", output, "--base_url", stub.url, "--model", "stub", "--limit", "2")
        assert prompts_in(output) == ["two cats", "ein Käfer 🐈"]
        stub.requests.clear()
        arguments = ("--input", prompts, "--output", output, "--base_url", stub.url, "--model", "stub")
        printed = run(*arguments, "--extra_body", '{"top_k": 5}')
        assert stub.bodies[-1]["top_k"] == 5
        assert {request.prompt for request in stub.requests} == {"a dog"}
    assert prompts_in(output) == ["two cats", "ein Käfer 🐈", "a dog"]
    assert "1 records added" in printed
    beside = {output.with_name(f"questions.jsonl{ending}") for ending in (".lock", ".decomposer.json")}
    assert set(tmp_path.iterdir()) == {prompts, output, *beside}
    for line in output.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["prompt", "semantic_questions", "quality_questions"]
        assert [question["is_valid"] for question in row["semantic_questions"]][-2:] == [True, False]


def test_the_command_of_the_error_about_missing_questions_makes_them(tmp_path: Path) -> None:
    file = tmp_path / "own prompts.jsonl"
    file.write_text("".join(json.dumps({"caption": prompt}) + "\n" for prompt in ("two cats", "a dog")))
    with pytest.raises(ValueError) as caught:
        load_prompts(str(file), "train", 1, prompt_column="caption")
    (command,) = re.findall(r"python recipes/decompose_prompts.py (.*)", str(caught.value))
    recipe = load_recipe("decompose_prompts")
    with chat_stub() as stub:
        words = shlex.split(command.replace("http://localhost:8000/v1", stub.url).replace("NAME", "stub"))
        (arguments,) = TrlParser((recipe.DecompositionArguments,)).parse_args_and_config(words)
        assert recipe.main(arguments) == 0
    rows = load_prompts(str(tmp_path / "own prompts_questions.jsonl"), "train", 1)
    assert sorted(rows["prompt"]) == ["a dog", "two cats"]


def test_a_column_of_prompts_needs_an_input_of_ones_own() -> None:
    recipe = load_recipe("decompose_prompts")
    for other in ({}, {"benchmark": "wise", "input": "wise"}):
        with pytest.raises(ValueError, match="prompt_column='caption' names a column of `input`"):
            recipe.DecompositionArguments(prompt_column="caption", **other)


def test_prompts_are_read_from_the_files_of_a_benchmark(tmp_path: Path) -> None:
    recipe = load_recipe("decompose_prompts")
    (tmp_path / "dpg").mkdir()
    (tmp_path / "dpg" / "1.txt").write_text("a cat,\nand a dog\n")
    (tmp_path / "dpg" / "2.txt").write_text("a bird")
    (tmp_path / "dpg" / "3.txt").write_text("a bird")
    row = {"Explanation": "e", "Category": "c", "Subcategory": "s"}
    wise = tmp_path / "natural_science.json"
    wise.write_text(json.dumps([{"Prompt": f"riddle {i}", **row, "prompt_id": i} for i in (1, 2)], indent=4))
    (tmp_path / "natural_science_rewrite.json").write_text(json.dumps([{"Prompt": "ice", **row, "prompt_id": 1}]))

    def load(**arguments: Any) -> list[str]:
        return recipe.load_input(recipe.DecompositionArguments(decomposer="shapes", **arguments))

    assert load(benchmark="dpg_bench", input=str(tmp_path / "dpg")) == ["a cat,\nand a dog", "a bird"]
    assert load(benchmark="wise", input=str(tmp_path)) == ["riddle 1", "riddle 2"]
    assert load(benchmark="wise", input=str(wise), limit=1) == ["riddle 1"]
    with pytest.raises(ValueError, match="unknown benchmark 'wize'. Did you mean 'wise'"):
        load(benchmark="wize", input=str(wise))
    with pytest.raises(ValueError, match="input is missing"):
        load(benchmark="wise")


def test_failures_are_listed_and_tried_again(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", ["a cat", "a cursed cat", "a dog", "a cursed dog"])
    output, failed = tmp_path / "questions.jsonl", tmp_path / "questions.jsonl.failed.jsonl"
    with chat_stub(failing_on("cursed")) as stub:
        arguments = ("--input", prompts, "--output", output, "--base_url", stub.url, "--max_retries", "0")
        printed = run(*arguments, code=1)
        assert sorted(prompts_in(output)) == ["a cat", "a dog"]
        rows = [json.loads(line) for line in failed.read_text().splitlines()]
        assert sorted(row["prompt"] for row in rows) == ["a cursed cat", "a cursed dog"]
        assert {row["reason"] for row in rows} == {"unusable answer"}
        assert "the answer holds no JSON object: 'I cannot do that.'" in rows[0]["detail"]
        assert "      2  unusable answer" in printed

        stub.requests.clear()
        stub.answer = failing_on("dog")
        run(*arguments, code=1)
        assert {request.prompt for request in stub.requests} == {"a cursed cat", "a cursed dog"}
        (row,) = [json.loads(line) for line in failed.read_text().splitlines()]
        assert row["prompt"] == "a cursed dog"

        stub.answer = good_answer
        assert "0 prompts failed" in run(*arguments)
    assert not failed.exists()
    assert prompts_in(output) == ["a cat", "a cursed cat", "a dog", "a cursed dog"]


def test_reasons_are_counted_apart(tmp_path: Path) -> None:
    def answer(request: ChatRequest) -> Any:
        if "forbidden" in request.prompt:
            return JSONResponse({"error": {"message": "not you"}}, status_code=403)
        return good_answer(request)

    prompts = write_prompts(tmp_path / "prompts.txt", ["forbidden fruit", "forbidden planet", "a cat"])
    with chat_stub(answer) as stub:
        output = tmp_path / "q.jsonl"
        printed = run("--input", prompts, "--output", output, "--base_url", stub.url, code=1)
    assert "      2  HTTP status 403" in printed
    # The example is whichever failed first.
    assert re.search(rf"'forbidden (fruit|planet)': {stub.url}/chat/completions answered 403 not you", printed)


def test_the_shapes_decomposer_reports_prompts_outside_its_grammar(tmp_path: Path) -> None:
    good = prompt_rows("train", 1, seed=0)[0]["prompt"]
    prompts = write_prompts(tmp_path / "prompts.txt", [good, "a photo of a cat"])
    output = tmp_path / "q.jsonl"
    printed = run("--input", prompts, "--output", output, "--decomposer", "shapes", code=1)
    assert "      1  not a prompt of the shapes world" in printed
    assert "its grammar does not have the word 'photo'" in printed
    assert prompts_in(output) == [good]


def test_a_torn_line_is_written_anew(tmp_path: Path) -> None:
    output = tmp_path / "q.jsonl"
    run("--output", output, "--limit", "5")
    whole = output.read_bytes()
    output.write_bytes(whole[:-30])
    assert "removed" in run("--output", output, "--limit", "5")
    assert output.read_bytes() == whole


def test_two_runs_cannot_write_to_one_file(tmp_path: Path) -> None:
    output = tmp_path / "q.jsonl"
    with RecordFile(output):
        assert "another process writes to" in run("--output", output, "--limit", "5", code=2)
        assert output.read_bytes() == b""
    run("--output", output, "--limit", "5")
    assert len(prompts_in(output)) == 5


def test_questions_of_two_decomposers_are_not_mixed(tmp_path: Path) -> None:
    output = tmp_path / "q.jsonl"
    run("--output", output, "--limit", "3")
    before = output.read_bytes()
    printed = run("--output", output, "--limit", "5", "--decomposer", "holistic", code=2)
    assert f"{output} holds questions that were made with decomposer 'shapes', and this run has 'holistic'" in printed
    assert output.read_bytes() == before
    # A file of an earlier version does not say what made it.
    (tmp_path / "q.jsonl.decomposer.json").unlink()
    assert "2 records added" in run("--output", output, "--limit", "5", "--decomposer", "holistic")
    assert not (tmp_path / "q.jsonl.decomposer.json").exists()


@pytest.mark.slow
def test_questions_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.txt", ["a cat"]), tmp_path / "q.jsonl"
    with chat_stub() as stub:
        arguments = ("--input", prompts, "--output", output, "--base_url", stub.url)
        # The only model that is served.
        run(*arguments)
        write_prompts(prompts, ["a cat", "a dog"])
        assert "with model 'stub', and this run has 'other'" in run(*arguments, "--model", "other", code=2)
        run(*arguments, "--model", "stub")
    assert prompts_in(output) == ["a cat", "a dog"]


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    with chat_stub() as stub:
        prompts = write_prompts(tmp_path / "prompts.txt", ["one", "two", "three", "four"])
        output = tmp_path / "new" / "q.jsonl"
        printed = run("--input", prompts, "--output", output, "--base_url", stub.url, "--dry_run")
        assert {request.prompt for request in stub.requests} == {"one", "two", "three"}
        stub.answer = failing_on("two")
        arguments = ("--input", prompts, "--base_url", stub.url, "--max_retries", "0", "--dry_run")
        assert "1  unusable answer" in run(*arguments, code=1, cwd=tmp_path)
    assert printed.count('"semantic_questions"') == 3
    assert list(tmp_path.iterdir()) == [prompts]


@pytest.mark.slow
def test_ctrl_c_leaves_a_file_that_can_be_gone_on_with(tmp_path: Path) -> None:
    def slow_answer(request: ChatRequest) -> Any:
        time.sleep(0.2)
        return failing_on("5")(request)

    names = [f"cat {number}" for number in range(60)]
    prompts = write_prompts(tmp_path / "prompts.txt", names)
    output, failed = tmp_path / "q.jsonl", tmp_path / "q.jsonl.failed.jsonl"
    with chat_stub(slow_answer) as stub:
        arguments = ("--input", prompts, "--output", output, "--base_url", stub.url)
        arguments += ("--max_concurrency", "2", "--max_retries", "0")
        # Children of a shell's background job ignore Ctrl-C, and a test may be run in one.
        process = start(*arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
        wait_for_lines(output, 8, process)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=DEADLINE)
        assert process.returncode == 130, errors
        assert "interrupted" in printed
        assert "cat 5" in failed.read_text()
        num_done = len(prompts_in(output))
        assert 8 <= num_done < 59
        stub.answer = good_answer
        assert f"{60 - num_done} records added" in run(*arguments)
    assert prompts_in(output) == names
    assert not failed.exists()


def test_a_run_that_only_fails_stops(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", [f"cat {number}" for number in range(200)])
    with chat_stub(lambda request: JSONResponse({"error": {"message": "who?"}}, status_code=401)) as stub:
        printed = run(
            *("--input", prompts, "--output", tmp_path / "q.jsonl", "--base_url", stub.url),
            *("--max_failures_in_a_row", "10", "--max_concurrency", "2"),
            code=1,
        )
        assert "stopped after 10 failures in a row" in printed
        assert len(stub.requests) < 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--limit", "0"), "limit must be at least 1, but is 0"),
        (("--decomposer", "shape"), "unknown decomposer 'shape'. Did you mean 'shapes'?"),
        (("--extra_body", "{top_k: 5}"), "extra_body must be a JSON object, but is not JSON"),
        (("--extra_body", "[5]"), "extra_body must be a JSON object, but is [5]"),
        (("--input", "gone.txt"), "there is no file or folder gone.txt"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    assert f"decompose_prompts.py: error: {message}" in run(*arguments, code=2, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_ten_thousand_prompts_survive_being_killed_twice(tmp_path: Path) -> None:
    names = [f"{number} cats in two hats" for number in range(10_000)]
    prompts = write_prompts(tmp_path / "prompts.txt", names)
    output = tmp_path / "questions.jsonl"
    rng = random.Random()
    with chat_stub() as stub:
        stub.keeps_requests = False
        arguments = ("--input", prompts, "--output", output, "--base_url", stub.url, "--max_concurrency", "16")
        num_before = 0
        for _ in range(2):
            process = start(*arguments)
            wait_for_lines(output, num_before + rng.randrange(1, 3000), process)
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert process.returncode == -signal.SIGKILL
            num_before = output.read_bytes().count(b"\n")
            assert 0 < num_before < 10_000
        printed = run(*arguments)
    assert f"{10_000 - num_before} records added" in printed
    assert prompts_in(output) == names
    # Twice at most 16 prompts that were under way when the process was killed.
    assert 10_000 <= stub.num_asked["facts"] <= 10_032
