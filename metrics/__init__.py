"""What evaluation.py is made of: texts, evaluation ASRs, metrics with intervals, tables and the HTML page."""
