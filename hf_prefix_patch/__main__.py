"""`python -m hf_prefix_patch`."""

from hf_prefix_patch.cli import main

if __name__ == "__main__":
    main()
