"""The measurements behind ``scripts/bench.py``, one file each."""
