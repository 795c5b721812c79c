"""The parts of train.py: flags, rows, trainers, callbacks, memory estimate, model card."""
