"""Download a dataset and show its files and first rows: ``chatlearn data download`` as a script.

python scripts/download_dataset.py --target=openai/gsm8k --path=/the/path/to/store/dataset
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from chatlearn.cli.data import add_download_arguments, run_download
from chatlearn.errors import ChatLearnError


def main() -> int:
    parser = argparse.ArgumentParser(description="download a dataset and show what came")
    add_download_arguments(parser)
    try:
        run_download(parser.parse_args())
    except ChatLearnError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
