"""What a run found, to look at: figures, and one HTML page.

style.py     colours and the way every figure is written
"""
