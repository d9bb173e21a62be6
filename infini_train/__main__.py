"""`infini-train` and `python -m infini_train`."""

import sys

from infini_train import preemption


def main() -> None:
    """Entry point of the console script."""
    command, *words = sys.argv[1:] or [""]
    if command == "inspect":  # answers at once: it needs neither torch nor lightning
        from infini_train.inspection.show import main as inspect

        try:
            inspect(words)
        except OSError as error:
            print(f"infini-train inspect: {error}", file=sys.stderr)
            sys.exit(2)
        return
    if command in ("fit", "stream"):
        preemption.listen()  # before imports that take seconds: a signal would end the process meanwhile
    from infini_train.cli import main

    main()


if __name__ == "__main__":
    main()
