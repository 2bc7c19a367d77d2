"""The paper's benchmark: python -m metaphd run|check|study"""

import sys

from metaphd import admission, benchmark, user_study
from run.command import run_script

COMMANDS = {"run": benchmark.main, "check": admission.main, "study": user_study.main}
HELP = """usage: python -m metaphd run|check|study ...

  run     personalize everybody, draw every prompt with every seed, score (paper, section 4)
  check   may these photos and prompts be used? (section 4.1)
  study   the user study: a blinded page of questions, and tables 1 and 2 from the answers (appendix C)

Each has a --help of its own.
"""


def main() -> None:
    name, *argv = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        print(HELP, end="", file=sys.stdout if name in ("-h", "--help") else sys.stderr)
        sys.exit(0 if name in ("-h", "--help") else 2)
    COMMANDS[name](argv)


if __name__ == "__main__":
    run_script(main)
