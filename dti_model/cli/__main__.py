"""`python -m dti_model.cli`."""

from dti_model.cli.main import run

if __name__ == "__main__":
    run()
