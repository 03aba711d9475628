"""The house style, and one function per figure; each takes measured values and returns a matplotlib Figure.

The same colour means the same thing in all of them: spike (vermilion), sink (blue), ordinary (grey). Titles are the
finding, computed from the numbers that are drawn. The names are listed in __init__.pyi.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
