"""`python -m dti_model.cli`, which `torchrun` starts."""

from dti_model.cli.command import run

if __name__ == "__main__":
    run()
