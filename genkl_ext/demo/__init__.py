"""``genkl demo``: the whole GenKL loop on 1,797 scanned digits, on any machine, in minutes.

    digits.py    writes the digits as JPEG files in the folder layout of Clothing1M
    network.py   a small network for them
    run.py       the data, then the recipe "demo" through ``genkl_ext.run``
    results.py   the finished run judged by the truth; its tables
    figures.py   its two pictures

Digits 0 to 7 are the classes. Every 8 and 9 fits none of them and was "crawled" under a random
class label. A quarter of the other noisy labels are those of the digit that looks most alike.
Which images these are is written beside the data and read only by ``results.py``, when all
training is over.
"""
