"""``python -m mm_retriever``: the command line where no script is on the PATH."""

from mm_retriever.cli import main

if __name__ == "__main__":
    main()
