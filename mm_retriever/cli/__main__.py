"""``python -m mm_retriever.cli``."""

from mm_retriever.cli import main

if __name__ == "__main__":
    main()
