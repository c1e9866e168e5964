"""`python -m examples.brain_segmentation`: see `--help`."""

import sys

if __name__ == "__main__":
    try:
        from examples.brain_segmentation.cli import main

        sys.exit(main())
    except KeyboardInterrupt:  # a second Ctrl-C, or one before training began
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
