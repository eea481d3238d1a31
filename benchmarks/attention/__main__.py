"""`python -m benchmarks.attention`: a process of `flex_tuned.Warming`."""

from benchmarks.attention.flex_tuned import main

if __name__ == "__main__":
    main()
