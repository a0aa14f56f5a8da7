"""Every bench, one after the other.

python -m bench [--quick] [--output bench/plots]
"""

from __future__ import annotations

import argparse
import subprocess
import sys

# What each of them takes to be quick.
BENCHES: dict[str, list[str]] = {
    "architectures": [],
    "memory": ["--vocabulary=4000", "--width=128"],
    "step": ["--vocabulary=4000", "--width=128", "--repeats=3"],
    "matrices": ["--quick", "--repeats=1"],
    "overhead": ["--repeats=20"],
    "below": ["--quick"],
    "loss": ["--quick", "--repeats=1"],
    "trainers": ["--quick"],
    "engines": ["--quick"],
    "cluster": [],
    "checkpoint": ["--quick"],
    "ensemble": ["--quick"],
    "mixed": ["--quick"],
    "export": ["--quick"],
    "decode": ["--new=8", "--repeats=1"],
    "scaling": ["--quick", "--repeats=1"],
}


def main() -> None:
    """Run them in processes of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only to see that they run")
    parser.add_argument("--output", default="bench/plots", help="for the plots")
    arguments = parser.parse_args()
    for name, short in BENCHES.items():
        options = list(short) if arguments.quick else []
        if name == "scaling":
            options.append(f"--output={arguments.output}")
        print(f"\n# python -m bench.{name}", *options, flush=True)
        subprocess.run([sys.executable, "-m", f"bench.{name}", *options], check=True)  # noqa: S603


if __name__ == "__main__":
    main()
