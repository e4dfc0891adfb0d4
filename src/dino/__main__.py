"""`python -m dino`, for `torchrun -m dino train ...`."""

from dino.cli import run

if __name__ == "__main__":
    run()
