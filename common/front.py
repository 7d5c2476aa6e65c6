"""The entry point for make. Variables come through the environment, so neither make nor a shell expands them again.

python -m common.front --check TARGET ...    checks targets, their variables and COMP, before anything is installed
python -m common.front TARGET                becomes the target's command, under torchrun with NPROC or NNODES
python -m common.front --recipes             every competition's recipes, for make help
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

from common import cli
from common import competition as competitions
from common.errors import UserError, did_you_mean
from common.loading.cores import cores

FLAGS = ("DATA", "RECIPE", "RUN", "FOLD", "FILE", "MSG", "FORCE", "RESUME", "TRIALS")  # DATA=x is --data x
PROCESSES = ("NPROC", "NNODES", "MASTER")
COUNT = "[1-9][0-9]*"
ALWAYS = ("ARGS", "PYTHON")
TOOLS = {"test": ["-m", "pytest"], "lint": ["-m", "ruff", "check", "."], "bench": []}  # targets without a competition
OF_VERBS = ("COMP", *FLAGS, *ALWAYS)
TAKES = dict.fromkeys(TOOLS, (*ALWAYS, "BENCH"))  # the variables of the targets that do not take OF_VERBS
TAKES |= {"new": ("COMP", "KIND", *ALWAYS), "train": (*OF_VERBS, *PROCESSES)}
TEST_PROCESSES = 4  # at most: each takes 1 GB, and a training that it starts 1 GB more
BENCHMARKS = sorted(file.stem for file in (Path(__file__).parents[1] / "benchmarks").glob("[!_]*.py"))


def check(target: str, given: Mapping[str, str]) -> None:
    """Raises UserError for a variable that the target does not take, an unknown COMP, or a target that it lacks."""
    comp, names = given.get("COMP", ""), given.get("GIVEN", "").split()
    known = ("COMP", "KIND", *FLAGS, *PROCESSES, "BENCH", *ALWAYS)
    for name in names:
        if name not in known:
            flag = f"--{name.lower().replace('_', '-')} {shlex.quote(given.get(name, ''))}"
            line = f"make {target}{f' COMP={comp}' if comp else ''} ARGS={_quoted(flag)}"
            hint = did_you_mean(name, known, 0.75) or f" A setting of the competition goes into ARGS: {line}"
            raise UserError(f"{name}={given.get(name, '')}: make has no such variable, only {' '.join(known)}.{hint}")
    takes = TAKES.get(target, OF_VERBS)
    if useless := [name for name in names if name not in takes and given.get(name)]:
        raise UserError(f"{useless[0]}={given[useless[0]]}: make {target} takes only {' '.join(takes)}: leave it out")
    if target not in TOOLS and target != "new":
        cli.verb_of(target, competitions.known(comp, target))
    command(target, given)


def command(target: str, given: Mapping[str, str]) -> list[str]:
    """The arguments of `python` for a target; raises UserError for values that make no valid command."""
    try:
        args = shlex.split(given.get("ARGS", ""))
    except ValueError as error:
        raise UserError(f'ARGS={given["ARGS"]}: {error}. Expected flags as in ARGS="--epochs 3"') from error
    if target == "bench" and given.get("BENCH") not in BENCHMARKS:
        raise UserError(f"BENCH={given.get('BENCH', '')}: expected one of {', '.join(BENCHMARKS)}")
    if target == "test" and not args and (processes := min(cores(), TEST_PROCESSES)) > 1:
        args = ["-n", str(processes), "--dist", "worksteal"]  # a few tests start sooner in one process
    if target in TOOLS:
        return [*(TOOLS[target] or ["-m", f"benchmarks.{given['BENCH']}"]), *args]
    flags = [f"--{name.lower()}={given[name]}" for name in (*FLAGS, "KIND") if given.get(name)]
    program = ["common", target, *([given["COMP"]] if given.get("COMP") else []), *flags, *args]
    nproc, nodes, master = (given.get(name, "") for name in PROCESSES)
    if not nproc and not nodes:
        return ["-m", *program]
    if not re.fullmatch(COUNT, nproc or "1") and nproc not in ("auto", "gpu", "cpu"):
        raise UserError(f"NPROC={nproc}: expected a number of processes, or auto, gpu or cpu for one on each of them")
    if nodes and not (re.fullmatch(COUNT, nodes) and master):
        raise UserError(
            f"NNODES={nodes} MASTER={master}: expected the number of machines, and the name and a free port of the "
            f"first, the same on all: NNODES=2 MASTER=host:29500"
        )
    meeting = ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", master] if nodes else ["--standalone"]
    return ["-m", "torch.distributed.run", *meeting, "--nproc-per-node", nproc or "1", "-m", "--", *program]


def recipes() -> str:
    """Every competition with the names of its recipes."""
    names = competitions.names()
    width = max(map(len, names), default=0)
    return "\n".join(f"  {name:{width}} {' '.join(competitions.load(name).recipes)}" for name in names)


def _quoted(text: str) -> str:
    """The text quoted for a shell: in double quotes, as in the README, if the shell expands nothing inside them."""
    return shlex.quote(text) if set(text) & set('"$`\\!') else f'"{text}"'


def main(argv: list[str], given: Mapping[str, str]) -> int:
    try:
        if argv[0] == "--check":
            for target in argv[1:]:
                check(target, given)
        elif argv[0] == "--recipes":
            print(f"competitions and their recipes (RECIPE=):\n{recipes()}")
        else:
            os.execv(sys.executable, [sys.executable, *command(argv[0], given)])
    except UserError as error:
        told = str(error).replace("\n", "\\n")  # one line, whatever a value holds
        print(f"error: {told}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
