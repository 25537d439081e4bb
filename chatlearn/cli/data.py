"""``chatlearn data``: fetch a dataset, look at it, make rows of it, serve an environment."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from chatlearn.errors import ConfigError, DataError

SHOWN_CHARACTERS = 400
"""Of one cell of a preview; the rest is cut."""
_PIPED_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    verbs = parser.add_subparsers(dest="data_verb", required=True, metavar="VERB")
    add_download_arguments(_verb(verbs, "download", "fetch a dataset and show what came"))
    preview = _verb(verbs, "preview", "show the first rows of every split")
    _add_source(preview)
    preview.add_argument("-n", type=_positive, default=3, metavar="ROWS", help="rows a split (3)")
    prepare = _verb(verbs, "prepare", "write rows for runtime_args.data_path")
    _add_source(prepare)
    _add_prepare_arguments(prepare)
    serve = _verb(verbs, "serve-environment", "serve an environment class over HTTP")
    _add_serve_arguments(serve)


def add_download_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        help="owner/name of Hugging Face, modelscope://owner/name, or a folder, which is copied",
    )
    parser.add_argument("--path", required=True, help="folder to put the dataset's folder in")
    parser.add_argument("-n", type=_positive, default=3, metavar="ROWS", help="rows a split (3)")


def main(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run one of the verbs. Raises ``DataError`` or ``ConfigError``."""
    if overrides:
        raise ConfigError(f"chatlearn data takes no settings, not {overrides[0]!r}")
    from chatlearn.observability.logs import setup_logging

    setup_logging()
    verbs = {
        "download": run_download,
        "preview": _preview,
        "prepare": _prepare,
        "serve-environment": _serve,
    }
    verbs[arguments.data_verb](arguments)


def run_download(arguments: argparse.Namespace) -> None:
    """Fetch, then one table of the files and one of the first rows of every split."""
    from chatlearn.data.dataset_folder import splits_in
    from chatlearn.data.download import data_files, download

    folder = download(arguments.target, Path(arguments.path))
    table = Table("", "file", "size", title="downloaded files", title_justify="left")
    table.columns[1].overflow = "fold"
    files = data_files(folder)
    for index, file in enumerate(files):
        table.add_row(str(index), Text(str(file)), decimal(file.stat().st_size))
    console = _console(at_least=max(len(str(file)) for file in files) + 30 if files else 0)
    console.print(table)
    for subset, splits in splits_in(folder).items():
        for split in splits:
            _print_split(console, str(folder), subset or None, split, arguments.n)


def _preview(arguments: argparse.Namespace) -> None:
    from chatlearn.data.dataset_folder import splits_in

    console, path = _console(), Path(arguments.source).expanduser()
    if not path.is_dir() or arguments.split:
        _print_split(console, arguments.source, arguments.subset, arguments.split, arguments.n)
        return
    found = splits_in(path)
    subsets = {n: s for n, s in found.items() if arguments.subset in (None, n)}
    if not subsets:
        raise DataError(f"{path} has no subset {arguments.subset!r}; it has {', '.join(found)}")
    for subset, splits in subsets.items():
        for split in splits:
            _print_split(console, str(path), subset or None, split, arguments.n)


def _prepare(arguments: argparse.Namespace) -> None:
    from chatlearn.data.field_map import FieldMap, to_rows
    from chatlearn.data.row_files import write_rows
    from chatlearn.data.task_sources import TaskSource, read_source

    source = TaskSource.of(arguments.source, split=arguments.split, subset=arguments.subset)
    named = {
        "query": arguments.query,
        "messages": arguments.messages,
        "ground_truth": arguments.ground_truth,
        "extract": arguments.extract,
        "system_prompt": arguments.system_prompt,
    }
    given = {key: value for key, value in named.items() if value}
    out = Path(arguments.out)
    if out.suffix not in (".json", ".jsonl"):
        raise DataError(f"--out {out}: name a .jsonl or .json file")
    rows = to_rows(
        read_source(source, limit=arguments.max_rows),
        FieldMap.of(given) if given else None,
        agent_name=arguments.agent_name,
        agent_cfg_path=arguments.agent_cfg_path,
        data_source=arguments.data_source,
    )
    write_rows(out, rows)
    sys.stdout.write(f"wrote {len(rows)} rows to {out.absolute()}; the first:\n")
    sys.stdout.write(json.dumps(rows[0], indent=2, ensure_ascii=False) + "\n")


def _serve(arguments: argparse.Namespace) -> None:
    from chatlearn.data.environment.protocol import KEY_VARIABLE
    from chatlearn.data.environment.server import serve
    from chatlearn.rewards.registry import load_function

    environment: Any = load_function(arguments.env.replace("->", ":"), "--env")
    serve(
        environment,
        host=arguments.host,
        port=arguments.port,
        api_key=os.environ.get(KEY_VARIABLE, ""),
        idle_s=arguments.idle_s,
        max_instances=arguments.max_instances,
    )


def _print_split(
    console: Console, path: str, subset: str | None, split: str | None, count: int
) -> None:
    from chatlearn.data.task_sources import TaskSource, read_source

    source = TaskSource.of(path, split=split, subset=subset)
    rows = read_source(source, limit=count)
    title = " / ".join(part for part in (subset, split) if part) or path
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table("", title=Text(title), title_justify="left", show_lines=True)
    for column in columns:
        table.add_column(Text(column))
    for index, row in enumerate(rows):
        table.add_row(f"[{index}]", *(Text(_cell(row, column)) for column in columns))
    console.print(table)


def _cell(row: Mapping[str, Any], column: str) -> str:
    if column not in row:
        return ""
    value = row[column]
    is_text = isinstance(value, str)
    text = value if is_text else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + " …"


def _console(at_least: int = 0) -> Console:
    """Tables are the output of the command, so they go where it can be piped from; there they are
    wide enough for whole paths."""
    width = None if sys.stdout.isatty() else max(_PIPED_WIDTH, at_least)
    return Console(file=sys.stdout, width=width, highlight=False, markup=False)


def _verb(verbs: Any, name: str, what: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=what, description=what)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", help="file, folder, hub id (modelscope://… for ModelScope) or environment's URL"
    )
    parser.add_argument("--split", help="the only one there is, or train")
    parser.add_argument("--subset", help="folder or configuration of the dataset, such as main")


def _add_prepare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="FILE", help="the .jsonl file to write")
    parser.add_argument("--agent_name", required=True, help="name given to @register(...)")
    parser.add_argument("--agent_cfg_path", help="YAML of the agent")
    parser.add_argument("--data_source", help="name the reward is registered for")
    parser.add_argument(
        "--query", metavar="COLUMN", help="of the question; known layouts need none"
    )
    parser.add_argument("--messages", metavar="COLUMN", help="of a list of messages, instead")
    parser.add_argument("--ground_truth", metavar="COLUMN", help="of the answer")
    parser.add_argument("--extract", choices=["as_is", "marked", "boxed"], help="as_is")
    parser.add_argument("--system_prompt", metavar="TEXT")
    parser.add_argument("--max_rows", type=_positive, help="all of them")


def _add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    named = "path/file.py:Class or pkg.mod:Class (-> instead of : is fine)"
    parser.add_argument("--env", required=True, metavar="CLASS", help=named)
    parser.add_argument("--host", default="127.0.0.1", help="(127.0.0.1)")
    parser.add_argument("--port", type=int, default=8765, help="(8765)")
    parser.add_argument(
        "--idle_s", type=float, default=1800.0, help="release an instance nobody uses (1800)"
    )
    parser.add_argument("--max_instances", type=_positive, default=4096, help="(4096)")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a number from 1 on")
    return value
