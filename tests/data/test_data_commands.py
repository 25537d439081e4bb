"""``chatlearn data`` and its script, as users run them, on mirrors in folders."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from chatlearn.data.prompt_dataset import read_tasks
from chatlearn.entrypoint import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """``mirror/gsm8k`` with two subsets; the current folder is ``here``."""
    for subset in ("main", "socratic"):
        for split in ("train", "test"):
            path = tmp_path / "mirror" / "gsm8k" / subset / f"{split}-00000-of-00001.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [
                {"question": f"{subset} {split} {n}? [bold]", "answer": f"so\n#### {n}"}
                for n in range(5)
            ]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mirror" / "gsm8k" / ".cache").mkdir()
    (tmp_path / "mirror" / "gsm8k" / ".cache" / "x").touch()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "mirror" / "gsm8k"


def run(capsys, *arguments):
    """What the command wrote to stdout; it must succeed."""
    code = main(["data", *map(str, arguments)])
    said = capsys.readouterr()
    assert code == 0, said.err
    return said.out


def refused(capsys, *arguments):
    assert main(["data", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_download_copies_a_mirror_and_shows_files_and_rows(capsys, mirror):
    printed = run(capsys, "download", "--target", mirror, "--path", "D", "-n", "2")
    here = Path("D/gsm8k").absolute()
    for index, name in enumerate(["main/test", "main/train", "socratic/test", "socratic/train"]):
        assert f"│ {index} │ {here}/{name}-00000-of-00001.jsonl " in printed
    assert ".cache" not in printed
    titles = [line.strip() for line in printed.splitlines() if " / " in line and "│" not in line]
    assert titles == ["main / train", "main / test", "socratic / train", "socratic / test"]
    assert printed.count("┃ question") == 4
    assert "[1] │ socratic test 1? [bold] │ so" in printed
    assert "train 2?" not in printed
    run(capsys, "download", "--target", mirror, "--path", "D")  # once more is fine
    said = refused(capsys, "download", "--target", mirror, "--path", mirror / "copy")
    assert "is inside" in said


HUB_FILES = {
    "README.md": b"---\nconfigs: [{config_name: main, data_files: main/a*}]\n---\n",
    "main/a.jsonl": b'{"question": "q?", "answer": "#### 1"}\n',
    "main/picture.bin": b"x",
}


class Hub(BaseHTTPRequestHandler):
    """What the client of Hugging Face asks for the dataset ``o/n``."""

    commit = "a" * 40

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        name = path.removeprefix(f"/datasets/o/n/resolve/{self.commit}/")
        tree = [
            {"type": "file", "path": name, "size": len(content), "oid": _digest(content)}
            for name, content in HUB_FILES.items()
        ]
        siblings = [{"rfilename": name} for name in HUB_FILES]
        if path.startswith("/api/datasets/o/n/tree"):
            self._answer(json.dumps(tree).encode())
        elif path.startswith("/api/datasets/o/n"):
            about = {"id": "o/n", "sha": self.commit, "siblings": siblings}
            self._answer(json.dumps(about).encode())
        elif name in HUB_FILES:
            self._answer(HUB_FILES[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def log_message(self, *args) -> None:
        pass

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{_digest(body)}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def hub():
    """URL of a hub of this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_hub_gives_all_files_to_a_download_and_the_data_to_a_reader(tmp_path, hub):
    code = """
import sys, json
from chatlearn.data.dataset_config import DatasetConfig
from chatlearn.entrypoint import main
assert main(["data", "download", "--target", "o/n", "--path", "D"]) == 0
sys.stdout.write(json.dumps(DatasetConfig("o/n", split="train", subset="main").read()))
"""
    home = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **home},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith('[{"question": "q?", "answer": "#### 1"}]')
    assert (tmp_path / "D/o/n/main/picture.bin").read_bytes() == b"x"
    cached = {path.name for path in (tmp_path / "home").rglob("snapshots/*/**/*")}
    assert cached == {"README.md", "main", "a.jsonl"}


@pytest.mark.parametrize("script", [True, False])
def test_a_hub_out_of_reach_is_one_error_and_exit_1(tmp_path, script):
    """``HF_ENDPOINT`` is a port nobody listens on."""
    program = [str(ROOT / "scripts/download_dataset.py")] if script else ["-m", "chatlearn", "data"]
    verb = [] if script else ["download"]
    done = subprocess.run(
        [sys.executable, *program, *verb, "--target=openai/gsm8k", f"--path={tmp_path}"],
        env={**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert "DataError: the dataset openai/gsm8k cannot be had from Hugging Face" in done.stderr
    assert "Traceback" not in done.stderr


def test_preview_of_a_folder_a_split_and_a_file(capsys, mirror):
    printed = run(capsys, "preview", mirror, "--subset", "main", "-n", "1")
    assert "main train 0?" in printed
    assert "main test 0?" in printed
    assert "socratic" not in printed
    assert "train 1?" not in printed
    one = run(capsys, "preview", mirror / "main", "--split", "test")
    assert "main test 2?" in one
    assert "train" not in one
    assert "main test 0?" in run(capsys, "preview", mirror / "main/test-00000-of-00001.jsonl")
    long = [{"text": "x" * 1000, "n": {"a": 1}}, {"other": None}]
    Path("long.json").write_text(json.dumps(long))
    printed = run(capsys, "preview", "long.json")
    assert printed.count("x") < 500
    assert '{"a": 1}' in printed


def test_preview_says_what_is_wrong(capsys, mirror):
    assert "has no split 'dev'; the splits are train, test" in refused(
        capsys, "preview", mirror / "main", "--split", "dev"
    )
    assert "no subset 'x'" in refused(capsys, "preview", mirror, "--subset", "x")
    assert "no such file or folder" in refused(capsys, "preview", "nothing")
    assert "takes no settings, not 'a=b'" in refused(capsys, "preview", mirror, "a=b")


def test_prepare_writes_rows_that_training_reads(capsys, mirror):
    options = ["--subset", "main", "--agent_name", "single_turn", "--out", "out/train.jsonl"]
    printed = run(capsys, "prepare", mirror, *options, "--max_rows", "2")
    assert "wrote 2 rows to" in printed
    first, _ = read_tasks(["out/train.jsonl"])
    assert first.messages == [{"role": "user", "content": "main train 0? [bold]"}]
    assert (first.ground_truth, first.data_source) == ("0", "openai/gsm8k")
    assert first.fields["task"] == {"question": "main train 0? [bold]", "answer": "so\n#### 0"}
    mapped = ["--query", "answer", "--ground_truth", "question", "--system_prompt", "Hm."]
    run(capsys, "prepare", mirror, *options, *mapped, "--data_source", "mine")
    first = read_tasks(["out/train.jsonl"])[0]
    assert first.messages[0] == {"role": "system", "content": "Hm."}
    assert (first.ground_truth, first.data_source) == ("main train 0? [bold]", "mine")
    said = refused(capsys, "prepare", mirror, *options, "--query", "q")
    assert "there is no column 'q'; the columns are question, answer" in said
    assert "name a .jsonl" in refused(
        capsys, "prepare", mirror, "--agent_name", "a", "--out", "x.parquet"
    )


def test_serve_environment_says_what_is_wrong(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("e.py").write_text("class Lame:\n    def step(self, action): ...\n")
    said = refused(capsys, "serve-environment", "--env", "e.py->Lame")
    assert "Lame is not an environment: it lacks tasks, create, evaluate, release" in said
    assert "no 'Lake'; did you mean 'Lame'" in refused(
        capsys, "serve-environment", "--env", "e.py:Lake"
    )
