"""Runs pages with SmolLM2 itself, and compares what they print with what they show.

python -m tests.helpers.real_pages README.md [PAGE ...]
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def main(pages: list[str]) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ.update(HF_HUB_CACHE=cache, HF_HUB_OFFLINE="1")  # read as they are imported
        from examples.shared.smollm2 import fetch_smollm2
        from tests.helpers.hub import folder_in
        from tests.helpers.pages import ROOT, agrees, blocks, run

        folder = folder_in(Path(cache))
        folder.rmdir()
        folder.symlink_to(fetch_smollm2())  # the whole: a merge follows no link out of its folder
        for name in pages:
            page = ROOT / name
            os.chdir(tempfile.mkdtemp(dir=cache))
            for block, printed in zip(blocks(page), run(page), strict=True):
                print(f"{name} prints:\n{printed}")
                if block.prints is not None and not agrees(printed, block.prints, numbers=True):
                    sys.exit(f"and it shows:\n{block.prints}")


if __name__ == "__main__":
    main(sys.argv[1:])
