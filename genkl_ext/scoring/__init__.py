"""Predictions in files in, scores in a file out.

    batches.py  BatchScorer: for the batches of a Ray Data or Spark job
    files.py    score_files: predictions -> one table, in bounded memory; resumable
    sources.py  prediction files of every kind, read a piece at a time
    chunks.py   some rows scored, and those that are none
    keys.py     key lists, and the list of NC keys (``nc_set.txt``)
    tables.py   the table of scores as Parquet, CSV or NumPy file

Nothing here needs torch; pyarrow is imported when a table is written.
"""

from .batches import BatchScorer
from .files import FileScores, Plan, plan, rows_without_prediction, score_files
from .keys import read_nc_list
from .sources import Fingerprint
from .tables import read_settings

__all__ = [
    "BatchScorer",
    "FileScores",
    "Fingerprint",
    "Plan",
    "plan",
    "read_nc_list",
    "read_settings",
    "rows_without_prediction",
    "score_files",
]
