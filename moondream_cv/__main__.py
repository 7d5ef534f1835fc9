"""`python -m moondream_cv` is `moondream-cv`."""

from moondream_cv.cli import main

if __name__ == "__main__":
    main()
