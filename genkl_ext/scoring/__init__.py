"""Predictions in files in, scores in a file out.

    files.py    score_files: memory-mapped predictions -> one table, in bounded memory
    npy.py      prediction files: what they promise, checked, and their fingerprint
    keys.py     key lists, and the list of NC keys (``nc_set.txt``)
    tables.py   the table of scores as Parquet, CSV or NumPy file

Nothing here needs torch; pyarrow is imported when a table is written.
"""

from .files import FileScores, rows_without_prediction, score_files
from .keys import read_nc_list
from .npy import Fingerprint
from .tables import read_settings

__all__ = [
    "FileScores",
    "Fingerprint",
    "read_nc_list",
    "read_settings",
    "rows_without_prediction",
    "score_files",
]
