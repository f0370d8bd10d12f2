"""``python -m compressor``: the same as ``compress``, for systems that have another program of that name."""

from compressor.cli.main import main

if __name__ == "__main__":
    main()
