"""Which files of a folder are one split: the layouts that ``datasets.load_dataset`` reads.

my_dataset/train.jsonl, test.jsonl                     a split is a file
gsm8k/main/train-00000-of-00001.parquet                or shards, in the folder of a subset
MATH-lighteval/data/test-00000-of-00001.parquet        data/ is the dataset itself
README.md with ``configs:``                            the card says which files are which
saved/dataset_dict.json, train/data-00000-of-00001.arrow     what ``save_to_disk`` leaves
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from chatlearn.data.raw_files import RAW_SUFFIXES
from chatlearn.errors import DataError

logger = logging.getLogger(__name__)

WHOLE = "train"
"""The split that files are which name none, as in ``datasets``."""
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
"""Words that name a split in a file's name, and which split they mean."""
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(-[0-9a-f]{16})?$")
_NOT_DATA = {
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
}
_OURS = re.compile(r"(train|test)_agent")
"""What ``data_preprocess`` writes beside the files it read."""
_DEPTH = 3

Splits = dict[str, list[Path]]


def files_of(path: Path, *, subset: str | None, split: str | None) -> list[Path]:
    """The files of one split, in order; a file is its own split.

    Raises:
        DataError: nothing is there, there is no such subset or split (those there are get listed),
            or several files could be meant.
    """
    if path.is_file():
        return [_checked_file(path, subset, split)]
    subsets = splits_in(path)
    splits = subsets[_chosen_subset(path, subset, subsets)]
    files = splits[_chosen_split(path, split, splits)]
    _check_shards(path, files)
    return files


def splits_in(folder: Path) -> dict[str, Splits]:
    """Every subset of a folder, and the files of its splits. ``""`` is the dataset itself.

    Raises:
        DataError: no such folder, or no data in it.
    """
    if not folder.is_dir():
        near = folder.parent if folder.parent.is_dir() else Path()
        names = ", ".join(sorted(p.name for p in near.iterdir() if not p.name.startswith("."))[:8])
        raise DataError(
            f"{folder}: no such file or folder; {near.absolute()} holds {names or 'nothing'}"
        )
    found = _by_card(folder) or _by_names(folder)
    if not found:
        raise DataError(
            f"{folder}: no data in it; looked for files ending in {', '.join(RAW_SUFFIXES)}"
        )
    return found


def split_of(relative: Path) -> str | None:
    """The split a file's name says (``gsm8k_dev.jsonl``: dev), else that its folder is named for.

    Args:
        relative: path inside the dataset's folder.
    """
    words = re.split(r"[^a-z]+", _SHARD.sub("", relative.stem).lower())
    return next((w for w in (*words, relative.parent.name.lower()) if w in _SPLITS), None)


def _meaning(word: str) -> str:
    return _SPLITS.get(word, word)


def _checked_file(path: Path, subset: str | None, split: str | None) -> Path:
    if path.suffix not in RAW_SUFFIXES:
        raise DataError(
            f"{path}: unknown suffix {path.suffix!r}; a dataset is one of {', '.join(RAW_SUFFIXES)}"
        )
    if subset:
        raise DataError(f"{path} is a file and has no subset {subset!r}; leave subset out")
    own = split_of(Path(path.name)) or WHOLE
    if split and _meaning(split) != _meaning(own):
        raise DataError(
            f"{path} is one file, taken as the split {own!r}, and split={split!r} was asked for; "
            "leave split out to read the file, or give the folder"
        )
    return path


def _chosen_subset(folder: Path, subset: str | None, subsets: dict[str, Splits]) -> str:
    named = sorted(name for name in subsets if name)
    if subset:
        fits = [name for name in named if subset in (name, name.rpartition("/")[2])]
        if len(fits) == 1:
            return fits[0]
        there = f"the subsets are {', '.join(named)}" if named else "it has no subsets"
        raise DataError(f"{folder} has no subset {subset!r}; {there}")
    for name in ("", "default"):
        if name in subsets:
            return name
    if len(named) == 1:
        return named[0]
    raise DataError(f"{folder} has several subsets: {', '.join(named)}; name one as subset")


def _chosen_split(folder: Path, split: str | None, splits: Splits) -> str:
    if split in splits:
        return split
    there = ", ".join(splits)
    if split is None:
        if len(splits) > 1 and WHOLE not in splits:
            raise DataError(f"{folder} has the splits {there}; name one as split")
        chosen = WHOLE if WHOLE in splits else next(iter(splits))
        if len(splits) > 1:
            logger.info("%s: the split %r of %s", folder, chosen, there)
        return chosen
    fits = [name for name in splits if _meaning(name) == _meaning(split)]
    if len(fits) != 1:
        raise DataError(f"{folder} has no split {split!r}; the splits are {there}")
    logger.info("%s: split %r is called %r there", folder, split, fits[0])
    return fits[0]


def _check_shards(folder: Path, files: list[Path]) -> None:
    names = ", ".join(str(file.relative_to(folder)) for file in files[:8])
    kinds = {file.suffix for file in files}
    shards = [_SHARD.search(file.stem) for file in files]
    totals = {int(shard[2]) for shard in shards if shard}
    if len(kinds) > 1 or len(totals) > 1 or (totals and not all(shards)):
        raise DataError(f"{folder}: several files could be this split: {names}; keep one of them")
    numbers = [int(shard[1]) for shard in shards if shard]
    if totals and numbers != list(range(totals.pop())):
        raise DataError(f"{folder}: shards of this split are missing or there twice: {names}")


def _by_names(folder: Path) -> dict[str, Splits]:
    found = (file for file in sorted(folder.rglob("*")) if file.is_file())
    files = [file.relative_to(folder) for file in found]
    files = [file for file in files if _is_data(file)]
    raw = [file for file in files if not _OURS.fullmatch(file.stem)]
    subsets: dict[str, Splits] = defaultdict(lambda: defaultdict(list))
    for file in raw or files:
        subsets[_subset_of(file)][split_of(file) or WHOLE].append(folder / file)
    return {name: _in_order(splits) for name, splits in subsets.items()}


def _subset_of(relative: Path) -> str:
    parts = list(relative.parent.parts)
    if parts and parts[-1].lower() in _SPLITS and split_of(Path(relative.name)) is None:
        parts.pop()  # train/part.jsonl: the folder of a split, not of a subset
    return "/".join(parts[1:] if parts[:1] == ["data"] else parts)


def _in_order(splits: Splits) -> Splits:
    """Training rows first, then validation, then test, then the others."""
    order = list(_SPLITS)
    rank = {name: order.index(name) if name in order else len(order) for name in splits}
    return {name: splits[name] for name in sorted(splits, key=rank.__getitem__)}


def _is_data(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    wanted = path.suffix in RAW_SUFFIXES and path.name not in _NOT_DATA
    return wanted and not hidden and len(path.parts) <= _DEPTH


def _by_card(folder: Path) -> dict[str, Splits]:
    """What ``configs`` in the head of the dataset's README.md says; {} when it says nothing."""
    found: dict[str, Splits] = {}
    for config in _card_configs(folder / "README.md"):
        splits = _card_splits(folder, config.get("data_files"))
        if splits:
            found[str(config.get("config_name", "default"))] = splits
            if config.get("default"):
                found[""] = splits
    return found


def _card_configs(card: Path) -> list[dict[str, Any]]:
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    head = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    try:
        said = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        logger.warning("%s: its head is not YAML; going by the names of the files", card)
        return []
    configs = said.get("configs") if isinstance(said, dict) else None
    return [c for c in configs if isinstance(c, dict)] if isinstance(configs, list) else []


def _card_splits(folder: Path, data_files: Any) -> Splits:
    """``data_files`` of a card: a pattern, patterns, or ``{split, path}``; only what is here."""
    entries = data_files if isinstance(data_files, list) else [data_files]
    splits: Splits = {}
    for entry in entries:
        named = entry if isinstance(entry, dict) else {"split": WHOLE, "path": entry}
        patterns = named.get("path")
        patterns = patterns if isinstance(patterns, list) else [patterns]
        relative = [p for p in patterns if isinstance(p, str) and not _leaves(p)]
        files = {file for pattern in relative for file in folder.glob(pattern) if file.is_file()}
        readable = sorted(file for file in files if file.suffix in RAW_SUFFIXES)
        if readable:
            splits.setdefault(str(named.get("split", WHOLE)), []).extend(readable)
    return splits


def _leaves(pattern: str) -> bool:
    """Whether a pattern of a card could name files outside of its folder."""
    return not pattern or pattern.startswith("/") or ".." in Path(pattern).parts
