"""`python -m accel`, and the command `accel`."""

from __future__ import annotations

import sys


def main() -> int:
    # Python put the working directory (or the command's own folder) there. Nothing of ours may
    # be imported from it; a program's folder is put there when it runs.
    if not sys.flags.safe_path:
        del sys.path[0]
    from accel import teardown
    from accel.compile import prefork

    prefork.disarm()
    teardown.first_copy()  # cheap only now, before anything else is imported
    from accel.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
