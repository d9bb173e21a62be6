"""`python -m infini_train`, the same as `infini-train`."""

from infini_train.commands import main

if __name__ == "__main__":
    main()
