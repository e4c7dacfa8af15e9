"""Write the bundled splits: `python -m tasks.bundle` regenerates assets/*-mini byte for byte.

Every file of tasks/bundles makes one split, of held-out names and values, by the generator that also makes the
training documents. `python -m tasks.bundle longbench needle` writes only these.
"""

import argparse
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from tasks import bundles

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPLITS = tuple(sorted(module.name for module in iter_modules(bundles.__path__)))


def write(name: str, assets: Path = ASSETS) -> Path:
    """Write one split; the folder it is in."""
    folder = assets / f"{name}-mini"
    folder.mkdir(parents=True, exist_ok=True)
    import_module(f"tasks.bundles.{name}").write(folder)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("splits", nargs="*", default=SPLITS, metavar="SPLIT", help=f"of {', '.join(SPLITS)}")
    parser.add_argument("--out", type=Path, default=ASSETS, help="the folder that the splits' folders are in")
    given = parser.parse_args()
    if unknown := set(given.splits) - set(SPLITS):
        parser.error(f"no split is called {', '.join(sorted(unknown))}; there are {', '.join(SPLITS)}")
    for name in given.splits:
        print(write(name, given.out))
