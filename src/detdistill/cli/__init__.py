"""The command line, ``detdistill COMMAND``: each command reads flags and YAML with jsonargparse and calls a Python function.

Heavy modules are imported only when a command runs, so ``--help`` is quick.
"""

from detdistill.cli.commands import VERBS, main, overview

__all__ = ["VERBS", "main", "overview"]
