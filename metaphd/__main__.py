"""The paper's benchmark as a command: python -m metaphd run|check|study."""

import sys

from metaphd import admission, benchmark, user_study
from run.command import run_script

COMMANDS = {"run": benchmark.main, "check": admission.main, "study": user_study.main}
HELP = """usage: python -m metaphd run|check|study ...

The benchmark of the Meta-LoRA paper; see docs/benchmark.md.

  run     personalize every person, generate all pictures, score them (section 4)
  check   check which photos and prompts follow the rules of Meta-PHD (section 4.1)
  study   the user study: make a blinded page of questions, count the answers (appendix C)

examples:
  python -m metaphd run --people people --out out/benchmark
  python -m metaphd check people

Each has a --help of its own.
"""


def main() -> int | None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name](argv)
    if name in ("-h", "--help"):
        print(HELP, end="")
    else:
        print(HELP, end="", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run_script(main)
