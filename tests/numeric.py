"""The numeric tests under every set of instructions and threads that changes their sums: `make test-numeric`.

    python -m tests.numeric                                  # all 18 combinations
    python -m tests.numeric default,Haswell,1 -,-,2          # these: ATEN_CPU_CAPABILITY, OPENBLAS_CORETYPE, threads
    python -m tests.numeric -- -k attend                     # what follows -- goes to pytest

Of the files below the tests that compare computed numbers are run, by tests/numbers.py. One line for each combination;
a failing one's output is shown. Exit code 1: one of them failed. "-" leaves the choice to the library, by the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from itertools import product

FILES = ["kernels", "methods", "runners/engine/test_together.py"]
VARIABLES = ("ATEN_CPU_CAPABILITY", "OPENBLAS_CORETYPE", "KVFRONTIER_TEST_THREADS")
CHOICES = (("default", "avx2", "-"), ("Haswell", "Zen", "-"), ("1", "2"))


def main(words: list[str]) -> int:
    """Returns the exit code."""
    cut = words.index("--") if "--" in words else len(words)
    combinations = [tuple(word.split(",")) for word in words[:cut]] or list(product(*CHOICES))
    wrong = [x for x in combinations if len(x) != 3 or any(y not in z for y, z in zip(x, CHOICES, strict=True))]
    if wrong:
        print(f"error: {','.join(wrong[0])}; give one of each, such as default,Haswell,1: {CHOICES}", file=sys.stderr)
        return 2
    failed = 0
    for i, combination in enumerate(combinations, 1):
        said = " ".join(f"{name}={value}" for name, value in zip(VARIABLES, combination, strict=True))
        print(f"[{i}/{len(combinations)}] {said} …", flush=True)
        env = {**os.environ, **dict(zip(VARIABLES, combination, strict=True))}
        env = {name: value for name, value in env.items() if not (name in VARIABLES and value == "-")}
        env.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin while they wait take the cores from the others
        workers = "2" if combination[2] == "1" else "0"
        command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--timeout", "600", "-p", "tests.numbers"]
        files = [f"tests/{file}" for file in FILES]
        began = time.monotonic()
        done = subprocess.run(
            [*command, "-m", "not slow and not slurm", *files, *words[cut + 1 :]],
            env=env,
            capture_output=True,
            text=True,
        )
        lines = (done.stdout + done.stderr).strip().splitlines()
        if done.returncode:
            failed += 1
            print("\n".join(lines[-200:]))
        print(f"    {lines[-1] if lines else 'no output'}; {time.monotonic() - began:.0f} s with the start", flush=True)
    print(f"{len(combinations) - failed} of {len(combinations)} combinations passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
